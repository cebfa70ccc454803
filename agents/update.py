"""Optimiser steps: Adam on the weights of a policy, a schedule of the learning rate, and sums of gradients."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.distributed import Processes
from agents.finite import GRAD_NORM, check_saving, check_step
from agents.master_weights import MasterWeights
from agents.policies.actor_critic import TrainablePolicy
from lmgym.errors import InvalidArgumentError
from lmgym.models.lean.graphs import adding_gradients

Loss = tuple[Tensor, dict[str, Tensor]]  # a scalar to minimise, and scalar metrics
_ALONE = Processes()


@dataclass(frozen=True)
class AdamConfig:
    """The numbers of an optimiser, as an agent's config gives them.

    Attributes:
        schedule: of the learning rate over the run, "constant", "linear" or "cosine".
        warmup: share of the run over which the learning rate rises.
        end: share of the learning rate that is left at the end of the run.
        betas: decay of the first moment and of the second, a step.
        eps: added to the root of the second moment.
        is_tensorflow: adds `eps` before the second moment is corrected for bias, as TensorFlow does; PyTorch adds it
            after.
        is_8bit: keeps the moments in 8 bits, by bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861).
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
    """

    schedule: str
    eps: float
    max_grad_norm: float
    warmup: float = 0.0
    end: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    is_tensorflow: bool = False
    is_8bit: bool = False


class Updater:
    """Steps the weights of a policy down the gradient of losses, by Adam.

    Args:
        policy: what learns.
        groups: its weights, each list with its learning rate at first.
        adam: the optimiser's numbers.
        config: the agent's numbers, for what an error advises.

    Attributes:
        optimizer: Adam, of PyTorch or of bitsandbytes.
        masters: float32 copies of half-precision weights, which the optimiser steps instead of them.
    """

    def __init__(
        self,
        policy: TrainablePolicy,
        groups: Sequence[tuple[list[nn.Parameter], float]],
        adam: AdamConfig,
        config: Any,
    ) -> None:
        self.policy = policy
        self.adam = adam
        self._config = config
        self._rates = [rate for _, rate in groups]
        parameters = [{"params": weights, "lr": rate} for weights, rate in groups]
        self.optimizer = _new_optimizer(parameters, adam, policy.device)
        self.masters = MasterWeights(self.optimizer)

    @property
    def lr(self) -> float:
        """The learning rate of the first group, now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, start: float, end: float | None = None) -> None:
        """Sets the learning rates for a batch, which lies between two shares of the run.

        In the warm-up the rate of a batch is that of its end, so that the first batch has one above 0.

        Args:
            start: share of the run before the batch. end: share with the batch; None is `start`.
        """
        warmup = self.adam.warmup
        progress = start
        if end is not None and start < warmup:
            progress = min(end, warmup)
        factor = lr_factor(self.adam.schedule, progress, warmup, self.adam.end)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def step(
        self,
        losses: Iterable[Loss],
        inputs: Mapping[str, Tensor] | None = None,
        processes: Processes = _ALONE,
    ) -> dict[str, float]:
        """Takes one step down the gradient of the sum of some losses.

        Args:
            losses: each is asked for after the gradient of the one before has been taken, and its graph is gone.
            inputs: what the losses are computed from, for the error where one of them is not finite.
            processes: each of which has other losses of the sum.

        Returns:
            The metrics of the losses, summed, and the norm of the gradient before it was clipped.

        Raises:
            NotFiniteError: before the step, for a loss or a gradient that is not finite.
        """
        weights = list(self.policy.parameters())
        sums = sum_gradients(losses, weights, processes)
        # One look at all the numbers: on a GPU, every look waits for the queue.
        numbers = torch.stack(list(sums.values())).tolist()
        metrics = dict(zip(sums, numbers, strict=True))
        check_step(metrics, self.policy, self._config, inputs or {})
        clip_gradients(weights, metrics[GRAD_NORM], self.adam.max_grad_norm or math.inf)
        if self.adam.is_tensorflow:
            self._correct_epsilon()
        self.optimizer.step()
        return metrics

    def _correct_epsilon(self) -> None:
        """Scales PyTorch's epsilon, added after the correction for bias, to TensorFlow's, added before."""
        steps = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        for group in self.optimizer.param_groups:
            group["eps"] = self.adam.eps / math.sqrt(1 - self.adam.betas[1] ** (steps + 1))

    def check(self) -> None:
        """Raises `NotFiniteError` for weights or moments that must not replace a good checkpoint."""
        check_saving(self.policy, self.optimizer, self._config)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up an optimiser's `state_dict`; betas and epsilon stay those of the config."""
        if self.adam.is_8bit:  # bitsandbytes calls no hooks there
            state = self.masters.take_from_state(self.optimizer, state)
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["betas"] = self.adam.betas
            group["eps"] = self.adam.eps


def check_bitsandbytes() -> None:
    """Raises `InvalidArgumentError` where the package bitsandbytes is missing, saying how to install it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidArgumentError(
            "`adam` must be one that is installed, got '8bit': it needs the package bitsandbytes "
            "(pip install -e '.[8bit]')."
        )


def _new_optimizer(groups: list[dict[str, Any]], adam: AdamConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam with the numbers of a config, over groups of weights with their learning rates."""
    if adam.is_8bit:
        from bitsandbytes.optim import Adam8bit

        optimizer: torch.optim.Optimizer = Adam8bit(groups, betas=adam.betas, eps=adam.eps)
        return optimizer
    is_fused = device.type in ("cpu", "cuda") or None  # one kernel a weight; None leaves it to PyTorch
    return torch.optim.Adam(groups, betas=adam.betas, eps=adam.eps, fused=is_fused)


def sum_gradients(
    losses: Iterable[Loss], weights: Iterable[nn.Parameter], processes: Processes = _ALONE
) -> dict[str, Tensor]:
    """Gives weights the gradient of the sum of some losses.

    Args:
        losses: scalars with their metrics, each asked for when the gradient of the one before has been taken.
        weights: what they depend on.
        processes: over whose losses the gradient and the metrics are summed.

    Returns:
        The metrics, summed by name, and the norm of the gradient, as float64 scalars.
    """
    weights = list(weights)
    for weight in weights:
        weight.grad = None
    sums: dict[str, Tensor] = {}
    with adding_gradients():
        for loss, metrics in losses:
            loss.backward()
            # Together, because every operation on a GPU is a launch.
            values = torch.stack(list(metrics.values())).double().unbind() if metrics else ()
            for name, value in zip(metrics, values, strict=True):
                sums[name] = sums[name] + value if name in sums else value
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    processes.add_up([*sums.values(), *gradients])
    sums[GRAD_NORM] = norm_of(gradients).double()
    return sums


def norm_of(gradients: Iterable[Tensor]) -> Tensor:
    """() the norm of all numbers in some tensors, summed in float32 where they are in half precision."""
    norms = [
        torch.stack(torch._foreach_norm(some, 2, dtype=torch.promote_types(some[0].dtype, torch.float32)))
        for some in _by_dtype(gradients)
    ]
    return torch.linalg.vector_norm(torch.cat(norms)) if norms else torch.zeros(())


@torch.no_grad()
def clip_gradients(weights: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scales the gradients of weights, whose norm is known, down to a norm where theirs is larger.

    A factor that is a number of the host takes one launch for all weights of a type, and none where there is nothing
    to scale; a tensor of another type than the gradients takes one a weight.
    """
    factor = limit / (norm + 1e-6)
    if factor >= 1:
        return
    for some in _by_dtype(weight.grad for weight in weights if weight.grad is not None):
        torch._foreach_mul_(some, factor)


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in lists of one type each: an operation on such a list is one launch."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.dtype, []).append(tensor)
    return list(lists.values())


def minibatch_rows(count: int, epochs: int, minibatches: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the rows of minibatches on the CPU, every row once a pass, in a new random order each pass.

    Args:
        count: of all rows. epochs: passes. minibatches: parts of a pass, of like size.
        generator: a CPU generator, drawn from at the start of each pass.
    """
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order.tensor_split(minibatches)


def lr_factor(schedule: str, progress: float, warmup: float = 0.0, end: float = 0.0) -> float:
    """What the learning rate is multiplied by.

    Args:
        schedule: "constant", "linear" or "cosine", the latter two from 1 to `end`.
        progress: share of the run that is over, in [0, 1].
        warmup: share of the run over which the factor rises from 0 to 1; the schedule takes up the rest.
        end: factor at the end.
    """
    if progress < warmup:
        return progress / warmup
    left = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    if schedule == "constant":
        return 1.0
    falling = {"linear": 1 - left, "cosine": 0.5 * (1 + math.cos(math.pi * left))}[schedule]
    return end + (1 - end) * falling


def average_steps(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a batch: means over its optimiser steps, and how many there were."""
    metrics = {name: float(np.mean([row[name] for row in history])) for name in history[0]}
    metrics["train/ratio_error"] = history[0]["train/ratio_error"]  # of the first step: nothing has changed yet
    metrics["train/updates"] = len(history)
    return metrics
