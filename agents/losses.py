"""Losses of policy optimisation: pure functions of (n,) tensors, one entry a token; `weights` (n,) sum to 1.

With weights 1 / n a loss is the mean over tokens; with 1 / (B * length) it is the mean over episodes of token means.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmgym.kl import k1, k2, k3
from lmgym.models.categorical import exact_kl

KLEstimator = Literal["k1", "k2", "k3", "exact"]


class PolicyLoss(NamedTuple):
    """`loss` to minimise, the `clip_fraction` of the weight, `approx_kl` = k3(pi_old || pi) in nats a token."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated.

    Args:
        log_probs: (n,) nats under the policy being updated. old_log_probs: (n,) under the one that sampled.
        advantages: (n,). weights: (n,). clip_range: epsilon.
        clip_range_high: epsilon of the upper side (Yu et al. 2025, DAPO); None is the same on both.
        dual_clip: c > 1; where the advantage is negative its term is held above c times it, whatever the ratio (Ye et
            al. 2020); None leaves it free.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    plain = ratio * advantages
    clipped = torch.minimum(plain, ratio.clamp(1 - clip_range, 1 + high) * advantages)
    if dual_clip is not None:
        clipped = torch.where(advantages < 0, torch.maximum(clipped, dual_clip * advantages), clipped)
    loss = -(weights * clipped).sum()
    with torch.no_grad():
        clip_fraction = (weights * (clipped != plain)).sum()
        # A token that left the support of a truncated distribution has ratio 0, and its log-ratio would drown the rest.
        approx_kl = (weights * (ratio - 1 - log_ratio.clamp(min=-20.0))).sum()
    return PolicyLoss(loss, clip_fraction, approx_kl)


def truncated_importance(log_ratio: Tensor, cap: float) -> Tensor:
    """min(ratio, cap), without a gradient: weights of truncated importance sampling (TIS; Yao et al. 2025).

    Multiplied with what an expectation under the sampler is of, they make one under the trainer, but for
    E_trainer[(1 - cap / ratio)^+ ...], which the cap takes away.

    Args:
        log_ratio: log of the trainer's probability over the sampler's, before an update; any shape.
        cap: C.
    """
    return log_ratio.detach().exp().clamp(max=cap)


def masked_importance(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where it lies in [low, high], and 0 elsewhere, without a gradient (IcePop; arXiv 2510.18855).

    Args:
        log_ratio: as in `truncated_importance`. low: alpha. high: beta.
    """
    ratio = log_ratio.detach().exp()
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """- sum of weights * advantages * log pi: its gradient is that of the policy-gradient theorem, negated.

    A token that left the support of a truncated distribution adds nothing.
    """
    return -(weights * advantages * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum()


def kl_estimate(
    kind: KLEstimator,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
) -> Tensor:
    """KL(pi || pi_ref) token by token, as a loss: differentiable, nats.

    Args:
        kind: k1, k2, k3 of the chosen tokens, or exact over the vocabulary. What their gradients estimate differs:
            docs/optimum.md has their bias, measured.
        log_probs: (n,) under the policy being updated. ref_log_probs: (n,).
        logits: (n, V) of the policy being updated, which need not be normalised, -inf outside the support.
        ref_logits: (n, V) of the reference, needed for the exact one.

    Returns:
        (n,), 0 for a chosen token that left the support of a truncated distribution.
    """
    if kind == "exact":
        assert ref_logits is not None
        return exact_kl(logits, ref_logits)
    log_ratio = (log_probs - ref_log_probs).masked_fill(log_probs == -torch.inf, 0.0)
    return {"k1": k1, "k2": k2, "k3": k3}[kind](log_ratio)


def value_loss(values: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Half the weighted squared error of (n,) values."""
    return 0.5 * (weights * (values - returns).square()).sum()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip_range: float | None
) -> Tensor:
    """Half the squared error: the larger of that of the value and of the value clipped to `clip_range` of the old one.

    Args:
        values: (n,) now. old_values: (n,) when the episodes were collected. returns: (n,) the target.
        weights: (n,). clip_range: None does not clip.
    """
    errors = (values - returns).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * (weights * errors).sum()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns] of (n,) tensors: 1 is a perfect critic, 0 no better than a constant."""
    variance = returns.var(correction=0)
    if variance == 0:
        return float("nan")
    return (1 - (returns - values).var(correction=0) / variance).item()
