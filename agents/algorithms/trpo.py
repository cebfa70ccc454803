"""Trust-region policy optimisation (Schulman et al. 2015): a natural-gradient step a batch, held to a KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.batch import Batch, Minibatch
from agents.finite import diverged
from agents.losses import value_loss
from agents.on_policy import OnPolicyAgent, ratio_gaps
from agents.on_policy_config import OnPolicyConfig
from agents.update import Loss
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import exact
from lmgym.ranges import Count, Fraction, NonNegative, Positive, PositiveFraction


@dataclass(frozen=True)
class TRPOConfig(OnPolicyConfig):
    """TRPO's own numbers. `epochs`, `minibatches`, `lr` and `max_grad_norm` are of the critic's regression."""

    epochs: Count = 5
    lr: NonNegative = 5e-3
    max_kl: Positive = 0.06  # nats a token between the old policy and the new, at first
    max_kl_schedule: Literal["constant", "linear"] = "linear"  # over the whole run; linear ends at 0
    fisher_fraction: PositiveFraction = 0.25  # of the batch's episodes, that the Fisher matrix is of
    cg_iterations: Count = 10
    cg_damping: NonNegative = 0.1  # times the identity, added to the Fisher matrix
    line_search_steps: Count = 10  # steps tried; if none will do the policy stays
    backtrack: PositiveFraction = 0.8  # each is this times the one before
    gae_lambda: Fraction = 0.95  # 0 is one-step TD, 1 is Monte Carlo

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_lr is not None:
            raise InvalidArgumentError(f"`critic_lr` must be null, for `lr` is the critic's, got {self.critic_lr!r}.")
        if self.autocast is not None:  # conjugate gradients would follow what rounding does to them
            raise InvalidArgumentError(f"`autocast` must be null for second derivatives, got {self.autocast!r}.")


class TRPO(OnPolicyAgent):
    """The surrogate's natural gradient by conjugate gradients, and a line search; the critic by regression."""

    Config = TRPOConfig
    config: TRPOConfig

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """GAE over the tokens of each episode; one that was truncated is bootstrapped with V of its last state."""
        return self.gae(episodes, rewards, self.config.gae_lambda)

    def loss(self, batch: Minibatch) -> Loss:
        """The critic's: half the squared error."""
        loss = value_loss(batch.values, batch.returns, batch.weights)
        return loss, {"train/value_loss": loss.detach()}

    def update(self, batch: Batch) -> dict[str, float]:
        """A natural step of the policy, then the critic's regression.

        The critic goes second: a head on the policy's trunk is to fit the trunk that the next batch is read with.
        """
        metrics = self.natural_step(batch)
        with _frozen(self.policy.policy_parameters()):
            return super().update(batch) | metrics

    def max_kl(self, progress: float) -> float:
        """Nats a token between the old policy and the new, at a share of the run."""
        if self.config.max_kl_schedule == "constant":
            return self.config.max_kl
        return self.config.max_kl * (1 - progress)

    def natural_step(self, batch: Batch) -> dict[str, float]:
        """x = F^-1 g, scaled to KL `max_kl` by the quadratic model of it, then cut back until it holds."""
        parameters = self.policy.policy_parameters()
        max_kl = self.max_kl(batch.progress)

        # 1. the surrogate and its gradient
        gradient = torch.zeros_like(flat(parameters))
        distributions = []
        gain = 0.0
        ratio_error = 0.0
        for part in self._parts(batch):
            part_gain = surrogate(part)
            gradient += flat(torch.autograd.grad(part_gain, parameters, materialize_grads=True))
            distributions.append(part.log_distribution.detach())
            gain += part_gain.item()
            ratio_error += (part.weights * ratio_gaps(self, part)).sum().item()
        self.tokens.read(batch.episodes, forward=0, backward=1)

        # 2. the direction, as long as the KL allows
        direction, residual, curvature = self._direction(batch, gradient, parameters)
        step = direction * (2 * max_kl / curvature).sqrt()
        self._check_natural({"surrogate": gain, "gradient": gradient, "natural gradient": step})

        # 3. shorter and shorter steps, until one holds
        smallest = torch.finfo(gradient.dtype).tiny
        metrics = {
            "train/ratio_error": ratio_error,
            "train/grad_norm": gradient.norm().item(),
            "train/cg_residual": (residual.norm() / gradient.norm().clamp(min=smallest)).item(),
            "train/max_kl": max_kl,
        }
        return metrics | self._search(batch, parameters, step, distributions, gain)

    @torch.no_grad()
    def _search(
        self, batch: Batch, parameters: list[nn.Parameter], step: Tensor, distributions: list[Tensor], gain: float
    ) -> dict[str, float]:
        """Takes the first of ever shorter steps that holds the KL and improves the surrogate; none if there is none.

        Args:
            batch: the episodes. parameters: P numbers in all.
            step: (P,) the longest. distributions: of the micro-batches before the step, (n, V) log-probs each.
            gain: the surrogate before the step.
        """
        max_kl = self.max_kl(batch.progress)
        start = flat(self.updater.masters.of(parameters))
        for i in range(self.config.line_search_steps):
            fraction = self.config.backtrack**i
            self._assign(parameters, start + fraction * step)
            new_gain = 0.0
            kl = 0.0
            for part, old in zip(self._parts(batch), distributions, strict=True):
                new_gain += surrogate(part).item()
                kl += (part.weights * exact(old, part.log_distribution)).sum().item()
            if kl <= max_kl and new_gain > gain:
                return {"train/kl": kl, "train/step_fraction": fraction, "train/surrogate_gain": new_gain - gain}
        self._assign(parameters, start)
        return {"train/kl": 0.0, "train/step_fraction": 0.0, "train/surrogate_gain": 0.0}

    def _check_natural(self, found: dict[str, float | Tensor]) -> None:
        """Raises `NotFiniteError` for a step that the line search would turn down, silently, in every batch to come."""
        for name, x in found.items():
            if not bool(torch.as_tensor(x).isfinite().all()):
                diverged(f"the {name} of the batch is not finite", self.config)

    def _assign(self, parameters: list[nn.Parameter], values: Tensor) -> None:
        """Gives parameters, and their copies in float32, new values (P,)."""
        assign(self.updater.masters.of(parameters), values)
        self.updater.masters.copy_back()

    def _direction(
        self, batch: Batch, gradient: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The natural gradient from F of a part of the episodes, whose graphs stay for all iterations.

        Returns:
            x (P,), the residual (P,), and x . (F + damping) x (), where F is of all the episodes.
        """
        config = self.config
        count = len(batch)
        rows = torch.randperm(count, generator=self.generator)[: math.ceil(config.fisher_fraction * count)]
        few = batch[rows.to(self.policy.device)]
        fishers = list(self._fishers(few, parameters))

        def product(vector: Tensor) -> Tensor:
            self.tokens.read(few.episodes, forward=0, backward=2)
            return sum((fisher.times(vector) for fisher in fishers), config.cg_damping * vector)

        x, residual = conjugate_gradient(product, gradient, config.cg_iterations)
        whole = fishers if len(few) == count else self._fishers(batch, parameters)
        curvature = sum((fisher.along(x) for fisher in whole), config.cg_damping * (x @ x))
        self.tokens.read(batch.episodes, forward=0, backward=1)
        return x, residual, curvature.clamp(min=torch.finfo(x.dtype).tiny)

    def _fishers(self, batch: Batch, parameters: list[nn.Parameter]) -> Iterator[Fisher]:
        """Yields the Fisher matrices of micro-batches, whose sum is that of the batch."""
        for part in self._parts(batch, twice=True):
            yield Fisher(part.log_distribution, part.weights, parameters)
        self.tokens.read(batch.episodes, forward=0, backward=1)

    def _parts(self, batch: Batch, *, twice: bool = False) -> Iterator[Minibatch]:
        """Yields micro-batches of like length, whose weights sum to 1; `twice` are those to be differentiated twice."""
        total = batch.episodes.lengths.sum()
        for part in batch.sort_by_length().split(self.config.micro_batch_size):
            with twice_differentiable() if twice else nullcontext():
                minibatch = self.read(part, total, len(batch))
            yield minibatch


def surrogate(batch: Minibatch) -> Tensor:
    """L = sum of weights * ratio * advantage (Schulman et al. 2015, eq. 14)."""
    return (batch.weights * (batch.log_probs - batch.old_log_probs).exp() * batch.advantages).sum()


class Fisher:
    """F = sum_i w_i sum_a pi(a|s_i) grad log pi(a|s_i) grad log pi(a|s_i)^T of some states, for many products.

    F is the Hessian of sum_i w_i KL(pi_old(.|s_i) || pi(.|s_i)) at pi = pi_old (Schulman et al. 2015, appendix C), and
    there equals J^T diag(w pi) J with J the Jacobian of the log-probs. J v is the derivative by u of v . J^T u, so that
    no second derivative of the network is formed. The graph of u -> J^T u depends on no vector, and is made once.

    Args:
        log_distribution: (n, V) log-probs with their graph, which can be differentiated twice; -inf off the support.
        weights: (n,). parameters: P numbers in all.
    """

    def __init__(self, log_distribution: Tensor, weights: Tensor, parameters: Sequence[Tensor]) -> None:
        self._log_distribution = log_distribution
        self._parameters = parameters
        self._mass = weights.unsqueeze(1) * log_distribution.detach().exp()
        self._u = torch.zeros_like(log_distribution, requires_grad=True)
        pulled = torch.autograd.grad(log_distribution, parameters, self._u, create_graph=True, materialize_grads=True)
        self._pulled = flat(pulled)

    def times(self, vector: Tensor) -> Tensor:
        """F v (P,) of v (P,)."""
        mass = self._mass * self._push(vector)
        pulled = torch.autograd.grad(
            self._log_distribution, self._parameters, mass, retain_graph=True, materialize_grads=True
        )
        return flat(pulled)

    def along(self, vector: Tensor) -> Tensor:
        """v . F v (), with no pull back."""
        return (self._mass * self._push(vector).square()).sum()

    def _push(self, vector: Tensor) -> Tensor:
        """J v (n, V), the change of the log-probs along v (P,)."""
        return torch.autograd.grad(self._pulled, self._u, vector, retain_graph=True)[0]


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Solves A x = b for a symmetric positive definite A from x = 0 (Hestenes & Stiefel 1952).

    Args:
        product: A times a (P,) vector. b: (P,).
        iterations: at most. tolerance: of |b - A x| / |b|, at which it ends sooner.

    Returns:
        x (P,), and b - A x (P,) as the recursion has it.
    """
    x = torch.zeros_like(b)
    residual = b.clone()
    along = b.clone()
    first = b @ b
    square = first
    for _ in range(iterations):
        if square <= tolerance**2 * first:
            break
        image = product(along)
        length = square / (along @ image)
        x = x + length * along
        residual = residual - length * image
        last = square
        square = residual @ residual
        along = residual + square / last * along
    return x, residual


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, (P,), in float32 or finer; a copy."""
    return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors])


def assign(parameters: Sequence[Tensor], values: Tensor) -> None:
    """Gives parameters the numbers of one tensor (P,), in their order: undoes `flat`."""
    with torch.no_grad():
        for parameter, part in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters take no gradients in here."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Forwards in here can be differentiated twice: fused attention and the GRU of cuDNN cannot."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield
