"""Trust-region policy optimisation (Schulman et al. 2015): a natural-gradient step a batch, held to a KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.finite import diverged
from agents.losses import value_loss
from agents.on_policy import Minibatch, OnPolicyAgent, OnPolicyConfig
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number
from lmgym.kl import exact


@dataclass(frozen=True)
class TRPOConfig(OnPolicyConfig):
    """TRPO's own numbers. `epochs`, `minibatches`, `lr` and `max_grad_norm` are of the critic's regression."""

    epochs: int = 5
    lr: float = 5e-3
    max_kl: float = 0.06  # nats a token between the old policy and the new, at first
    max_kl_schedule: Literal["constant", "linear"] = "linear"  # over the whole run; linear ends at 0
    fisher_fraction: float = 0.25  # of the batch's episodes, that the Fisher matrix is of
    cg_iterations: int = 10
    cg_damping: float = 0.1  # times the identity, added to the Fisher matrix
    line_search_steps: int = 10  # steps tried; if none will do the policy stays
    backtrack: float = 0.8  # each is this times the one before
    gae_lambda: float = 0.95  # 0 is one-step TD, 1 is Monte Carlo

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_lr is not None:
            raise InvalidArgumentError(f"`critic_lr` must be null, for `lr` is the critic's, got {self.critic_lr!r}.")
        check_number("max_kl", self.max_kl, 0, open_low=True)
        check_choice("max_kl_schedule", self.max_kl_schedule, ("constant", "linear"))
        check_number("fisher_fraction", self.fisher_fraction, 0, 1, open_low=True)
        check_int("cg_iterations", self.cg_iterations, 1)
        check_number("cg_damping", self.cg_damping, 0)
        check_int("line_search_steps", self.line_search_steps, 1)
        check_number("backtrack", self.backtrack, 0, 1, open_low=True)
        check_number("gae_lambda", self.gae_lambda, 0, 1)


class TRPO(OnPolicyAgent):
    """The surrogate's natural gradient by conjugate gradients, and a line search; the critic by regression."""

    Config = TRPOConfig
    config: TRPOConfig
    _progress = 0.0  # share of the run behind

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """GAE over the tokens of each episode; one that was truncated is bootstrapped with V of its last state."""
        return self.gae(episodes, rewards, self.config.gae_lambda)

    def loss(self, batch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's: half the squared error."""
        loss = value_loss(batch.values, batch.returns, batch.weights)
        return loss, {"train/value_loss": loss.detach()}

    @property
    def law_parameters(self) -> list[nn.Parameter]:
        """What the law depends on: the weights of the policy but for the critic's head and the critic's own trunk."""
        return self._parameters()[0]

    def _optimise(self, episodes: Episodes, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        metrics = self._natural_step(episodes, advantages, returns)
        # The critic goes second: a head on the policy's trunk is to fit the trunk that the next batch is read with.
        with _frozen(self.law_parameters):
            return super()._optimise(episodes, advantages, returns) | metrics

    def _set_lr(self, progress: float, end: float) -> None:
        super()._set_lr(progress, end)
        self._progress = progress

    @property
    def max_kl(self) -> float:
        """Nats a token between the old policy and the new, at this place of the run."""
        return self.config.max_kl * (1 - self._progress if self.config.max_kl_schedule == "linear" else 1)

    def _natural_step(self, episodes: Episodes, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """x = F^-1 g, scaled to KL `max_kl` by the quadratic model of it, then cut back until it holds."""
        parameters, max_kl = self.law_parameters, self.max_kl
        batches = partial(self._batches, episodes, advantages, returns)
        gradient, laws, before, ratio_error = torch.zeros_like(flat(parameters)), [], 0.0, 0.0
        for batch in batches():
            gain = surrogate(batch)
            gradient += flat(torch.autograd.grad(gain, parameters, materialize_grads=True))
            laws.append(batch.log_law.detach())
            before += gain.item()
            ratio_error += (batch.weights * (batch.log_probs - batch.old_log_probs).abs()).sum().item()
        self.tokens.read(episodes, forward=0, backward=1)
        direction, residual, curvature = self._direction(episodes, advantages, returns, gradient)
        step, start = direction * (2 * max_kl / curvature).sqrt(), flat(self.masters.of(parameters))
        self._check_natural({"surrogate": before, "gradient": gradient, "natural gradient": step})
        metrics = {
            "train/ratio_error": ratio_error,
            "train/grad_norm": gradient.norm().item(),
            "train/cg_residual": (residual.norm() / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)).item(),
            "train/max_kl": max_kl,
            "train/kl": 0.0,
            "train/step_fraction": 0.0,
            "train/surrogate_gain": 0.0,
        }
        with torch.no_grad():
            for i in range(self.config.line_search_steps):
                fraction = self.config.backtrack**i
                self._assign(start + fraction * step)
                after, kl = 0.0, 0.0
                for batch, old in zip(batches(), laws, strict=True):
                    after += surrogate(batch).item()
                    kl += (batch.weights * exact(old, batch.log_law)).sum().item()
                if kl <= max_kl and after > before:
                    found = {"kl": kl, "step_fraction": fraction, "surrogate_gain": after - before}
                    return metrics | {f"train/{name}": x for name, x in found.items()}
            self._assign(start)
        return metrics

    def _check_natural(self, found: dict[str, float | Tensor]) -> None:
        """Raises `NotFiniteError` for a step that the line search would turn down, silently, in every batch to come."""
        for name, x in found.items():
            if not bool(torch.as_tensor(x).isfinite().all()):
                diverged(f"the {name} of the batch is not finite", self.config)

    def _assign(self, values: Tensor) -> None:
        """Gives the weights of the law, and their copies in float32, new values (P,)."""
        _assign(self.masters.of(self.law_parameters), values)
        self.masters.copy_back()

    def _direction(
        self, episodes: Episodes, advantages: Tensor, returns: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The natural gradient from F of a part of the episodes, whose graphs are kept for all iterations.

        Returns:
            x (P,), the residual (P,), and x . (F + damping) x (), where F is of all the episodes.
        """
        config, parameters, count = self.config, self.law_parameters, len(episodes)
        some = torch.randperm(count, generator=self.generator)[: math.ceil(config.fisher_fraction * count)]
        some = some.to(self.policy.device)
        few = episodes[some]

        def fishers(episodes: Episodes, advantages: Tensor, returns: Tensor) -> Iterator[Fisher]:
            for batch in self._batches(episodes, advantages, returns, twice=True):
                yield Fisher(batch.log_law, batch.weights, parameters)
            self.tokens.read(episodes, forward=0, backward=1)

        kept = list(fishers(few, advantages[some], returns[some]))

        def product(vector: Tensor) -> Tensor:
            self.tokens.read(few, forward=0, backward=2)
            return sum((fisher.times(vector) for fisher in kept), config.cg_damping * vector)

        x, residual = conjugate_gradient(product, gradient, config.cg_iterations)
        whole = kept if len(few) == count else fishers(episodes, advantages, returns)
        curvature = sum((fisher.along(x) for fisher in whole), config.cg_damping * (x @ x))
        self.tokens.read(episodes, forward=0, backward=1)
        return x, residual, curvature.clamp(min=torch.finfo(x.dtype).tiny)

    def _batches(
        self, episodes: Episodes, advantages: Tensor, returns: Tensor, *, twice: bool = False
    ) -> Iterator[Minibatch]:
        """Micro-batches of like length, whose weights sum to 1; `twice` are those to be differentiated twice."""
        total, count = episodes.lengths.sum(), len(episodes)
        for rows in episodes.lengths.argsort().split(self.config.micro_batch_size):
            with _twice_differentiable() if twice else nullcontext():
                batch = self._read(episodes, advantages, returns, rows, total, count)
            yield batch


def surrogate(batch: Minibatch) -> Tensor:
    """L = sum of weights * ratio * advantage (Schulman et al. 2015, eq. 14)."""
    return (batch.weights * (batch.log_probs - batch.old_log_probs).exp() * batch.advantages).sum()


class Fisher:
    """F = sum_i w_i sum_a pi(a|s_i) grad log pi(a|s_i) grad log pi(a|s_i)^T of some states, for many products.

    F is the Hessian of sum_i w_i KL(pi_old(.|s_i) || pi(.|s_i)) at pi = pi_old (Schulman et al. 2015, appendix C), and
    there equals J^T diag(w pi) J with J the Jacobian of the log-probs. J v is the derivative by u of v . J^T u, so that
    no second derivative of the network is formed. The graph of u -> J^T u depends on no vector, and is made once.

    Args:
        log_law: (n, V) log-probs with their graph, which can be differentiated twice; -inf off the support.
        weights: (n,). parameters: P numbers in all.
    """

    def __init__(self, log_law: Tensor, weights: Tensor, parameters: Sequence[Tensor]) -> None:
        self._log_law, self._parameters = log_law, parameters
        self._mass = weights.unsqueeze(1) * log_law.detach().exp()
        self._u = torch.zeros_like(log_law, requires_grad=True)
        self._pulled = flat(
            torch.autograd.grad(log_law, parameters, self._u, create_graph=True, materialize_grads=True)
        )

    def times(self, vector: Tensor) -> Tensor:
        """F v (P,) of v (P,)."""
        mass = self._mass * self._push(vector)
        return flat(
            torch.autograd.grad(self._log_law, self._parameters, mass, retain_graph=True, materialize_grads=True)
        )

    def along(self, vector: Tensor) -> Tensor:
        """v . F v (), with no pull back."""
        return (self._mass * self._push(vector).square()).sum()

    def _push(self, vector: Tensor) -> Tensor:
        """J v (n, V)."""
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
    x, residual, along = torch.zeros_like(b), b.clone(), b.clone()
    square = first = b @ b
    for _ in range(iterations):
        if square <= tolerance**2 * first:
            break
        image = product(along)
        length = square / (along @ image)
        x, residual = x + length * along, residual - length * image
        last, square = square, residual @ residual
        along = residual + square / last * along
    return x, residual


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, (P,), in float32 or finer; a copy."""
    return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors])


def _assign(parameters: Sequence[Tensor], values: Tensor) -> None:
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
def _twice_differentiable() -> Iterator[None]:
    """Forwards in here can be differentiated twice: fused attention and the GRU of cuDNN cannot."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield
