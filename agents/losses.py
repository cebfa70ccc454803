"""Losses of policy optimisation: pure functions of (n,) tensors, one entry a token; `weights` (n,) sum to 1.

With weights 1 / n a loss is the mean over tokens; with 1 / (B * length) it is the mean over episodes of token means.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """`loss` to minimise, the `clip_fraction` of the weight, `approx_kl` = k3(pi_old || pi) in nats a token."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip_range: float
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated.

    Args:
        log_probs: (n,) nats under the policy being updated. old_log_probs: (n,) under the one that sampled.
        advantages: (n,). weights: (n,). clip_range: epsilon.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -(weights * torch.minimum(plain, clipped)).sum()
    with torch.no_grad():
        clip_fraction = (weights * (clipped < plain)).sum()
        # A token that left the support of a truncated law has ratio 0, and a log-ratio that would drown the rest.
        approx_kl = (weights * (ratio - 1 - log_ratio.clamp(min=-20.0))).sum()
    return PolicyLoss(loss, clip_fraction, approx_kl)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip_range: float | None
) -> Tensor:
    """Half the squared error, the larger of that of the value and of the value kept within `clip_range` of the old one.

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
    variance = returns.var()
    return float("nan") if variance == 0 else (1 - (returns - values).var() / variance).item()
