"""Trust-region policy optimisation (Schulman et al. 2015): a natural-gradient step a batch, held to a KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.base import Minibatch, OnPolicyAgent, OnPolicyConfig
from agents.losses import value_loss
from lmgym.episodes import Episodes
from lmgym.errors import check_int, check_number
from lmgym.kl import exact


@dataclass(frozen=True)
class TRPOConfig(OnPolicyConfig):
    """TRPO's own numbers. `epochs`, `minibatches`, `lr` and `max_grad_norm` are of the critic's regression."""

    epochs: int = 5
    lr: float = 5e-3
    max_kl: float = 0.03  # nats a token between the old policy and the new
    cg_iterations: int = 10
    cg_damping: float = 1e-3  # times the identity, added to the Fisher matrix
    line_search_steps: int = 10  # steps tried; if none will do the policy stays
    backtrack: float = 0.8  # each is this times the one before
    gae_lambda: float = 0.95  # 0 is one-step TD, 1 is Monte Carlo

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("max_kl", self.max_kl, 0, open_low=True)
        check_int("cg_iterations", self.cg_iterations, 1)
        check_number("cg_damping", self.cg_damping, 0)
        check_int("line_search_steps", self.line_search_steps, 1)
        check_number("backtrack", self.backtrack, 0, 1, open_low=True)
        check_number("gae_lambda", self.gae_lambda, 0, 1)


class TRPO(OnPolicyAgent):
    """The surrogate's natural gradient by conjugate gradients, and a line search; the critic by regression."""

    Config = TRPOConfig
    config: TRPOConfig

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
        named = self.policy.named_parameters()
        return [p for name, p in named if p.requires_grad and name.split(".")[0] not in ("critic", "value_head")]

    def _optimise(self, episodes: Episodes, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        metrics = self._natural_step(episodes, advantages, returns)
        # The critic goes second: a head on the policy's trunk is to fit the trunk that the next batch is read with.
        with _frozen(self.law_parameters):
            return super()._optimise(episodes, advantages, returns) | metrics

    def _natural_step(self, episodes: Episodes, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """x = F^-1 g, scaled to KL `max_kl` by the quadratic model of it, then cut back until it holds."""
        config, parameters = self.config, self.law_parameters
        rows = episodes.lengths.argsort().split(config.micro_batch_size)
        total, count = episodes.lengths.sum(), len(episodes)

        def batches() -> Iterator[Minibatch]:
            for part in rows:
                with _twice_differentiable():
                    batch = self._read(episodes, advantages, returns, part, total, count)
                yield batch

        gradient, laws, before, ratio_error = torch.zeros_like(flat(parameters)), [], 0.0, 0.0
        for batch in batches():
            gain = surrogate(batch)
            gradient += flat(torch.autograd.grad(gain, parameters, materialize_grads=True))
            laws.append(batch.log_law.detach())
            before += gain.item()
            ratio_error += (batch.weights * (batch.log_probs - batch.old_log_probs).abs()).sum().item()

        def product(vector: Tensor) -> Tensor:
            parts = (fisher_product(batch.log_law, batch.weights, parameters, vector) for batch in batches())
            return sum(parts, config.cg_damping * vector)

        direction, residual = conjugate_gradient(product, gradient, config.cg_iterations)
        curvature = (direction @ (gradient - residual)).clamp(min=torch.finfo(direction.dtype).tiny)
        step, start = direction * (2 * config.max_kl / curvature).sqrt(), flat(parameters)
        metrics = {
            "train/ratio_error": ratio_error,
            "train/grad_norm": gradient.norm().item(),
            "train/cg_residual": (residual.norm() / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)).item(),
            "train/kl": 0.0,
            "train/step_fraction": 0.0,
            "train/surrogate_gain": 0.0,
        }
        with torch.no_grad():
            for i in range(config.line_search_steps):
                fraction = config.backtrack**i
                _assign(parameters, start + fraction * step)
                after, kl = 0.0, 0.0
                for batch, old in zip(batches(), laws, strict=True):
                    after += surrogate(batch).item()
                    kl += (batch.weights * exact(old, batch.log_law)).sum().item()
                if kl <= config.max_kl and after > before:
                    found = {"kl": kl, "step_fraction": fraction, "surrogate_gain": after - before}
                    return metrics | {f"train/{name}": x for name, x in found.items()}
            _assign(parameters, start)
        return metrics


def surrogate(batch: Minibatch) -> Tensor:
    """L = sum of weights * ratio * advantage (Schulman et al. 2015, eq. 14)."""
    return (batch.weights * (batch.log_probs - batch.old_log_probs).exp() * batch.advantages).sum()


def fisher_product(log_law: Tensor, weights: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """F v, with F = sum_i w_i sum_a pi(a|s_i) grad log pi(a|s_i) grad log pi(a|s_i)^T.

    F is the Hessian of sum_i w_i KL(pi_old(.|s_i) || pi(.|s_i)) at pi = pi_old (Schulman et al. 2015, appendix C), and
    there equals J^T diag(w pi) J with J the Jacobian of the log-probs. J v is the derivative by u of v . J^T u, so that
    no second derivative of the network is formed.

    Args:
        log_law: (n, V) log-probs with their graph, kept; -inf off the support. weights: (n,).
        parameters: P numbers in all. vector: (P,).

    Returns:
        (P,).
    """
    u = torch.zeros_like(log_law, requires_grad=True)
    pulled = torch.autograd.grad(log_law, parameters, u, create_graph=True, materialize_grads=True)
    (pushed,) = torch.autograd.grad(flat(pulled) @ vector, u)
    weighted = weights.unsqueeze(1) * log_law.detach().exp() * pushed
    return flat(torch.autograd.grad(log_law, parameters, weighted, retain_graph=True, materialize_grads=True))


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
