"""Importance weights of tokens that something else than the trainer has sampled.

Three log-probs of one token meet here. That of the sampler is what it was drawn with. That of the trainer, before the
update, is recomputed (`recompute_log_probs`): PPO's ratio starts from it. That of the policy while it changes is in the
loss. A weight is of the first two, and does not change during an update.

Shapes: B episodes, T response columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.batch import Batch
from agents.diagnostics import log_prob_gap
from agents.losses import masked_importance, truncated_importance
from agents.on_policy_config import OnPolicyConfig


def weigh(batch: Batch, config: OnPolicyConfig, is_possible: Tensor | None = None) -> Tensor:
    """(B, T) importance weights of a batch's tokens, the trainer's log-probs over the sampler's; 0 off the mask.

    Args:
        batch: with both. config: what the weights are.
        is_possible: (B, T) bool, False for tokens that the trainer cannot draw, whose ratio is 0; None is all.
    """
    assert batch.sampler_log_probs is not None
    mask = batch.episodes.response_mask
    log_ratio = (batch.episodes.log_probs - batch.sampler_log_probs) * mask
    if is_possible is not None:
        log_ratio = log_ratio.masked_fill(~is_possible, -torch.inf)
    if config.importance_level == "response":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    if config.importance == "truncated":
        weights = truncated_importance(log_ratio, config.importance_high)
    else:
        weights = masked_importance(log_ratio, config.importance_low, config.importance_high)
    return torch.where(mask, weights, 0.0)


def sampler_kl(log_ratios: Tensor) -> float:
    """KL(sampler || trainer), nats a token, of the sampler's tokens: the mean of x - 1 - log x, x = trainer / sampler.

    No term is negative, and where the sampler can draw all that the trainer can, the mean is unbiased: that of x is 1.

    Args:
        log_ratios: (n,) of the trainer's probability over the sampler's.
    """
    return (log_ratios.expm1() - log_ratios).mean().item()


def measure_sampler(batch: Batch) -> dict[str, float]:
    """How far a batch's log-probs are from those that its sampler gave, where they were recomputed; and the weights."""
    if batch.sampler_log_probs is None:
        return {}
    metrics = {"train/sampler_gap": log_prob_gap(batch.episodes, batch.sampler_log_probs)}
    log_ratios = (batch.episodes.log_probs - batch.sampler_log_probs)[batch.episodes.response_mask]
    metrics["train/sampler_gap_max"] = log_ratios.abs().max().item()
    metrics["train/sampler_kl"] = sampler_kl(log_ratios)
    if batch.importance is not None:
        metrics["train/importance"] = batch.importance[batch.episodes.response_mask].mean().item()
    return metrics
