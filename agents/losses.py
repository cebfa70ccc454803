"""Losses of policy optimisation: pure functions of (n,) tensors, one entry a token; `weights` (n,) sum to 1.

With weights 1 / n a loss is the mean over tokens; with 1 / (B * length) it is the mean over episodes of token means.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmgym.kl import k1, k2, k3
from lmgym.models.categorical import exact_kl

KLEstimator = Literal["k1", "k2", "k3", "exact", "k2_to_go"]


class PolicyLoss(NamedTuple):
    """`loss` to minimise, the `clip_fraction` of the weight, `approx_kl` = k3(pi_old || pi) in nats a token."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What an algorithm logs of it where its weights are those of a mean over tokens."""
        names = ("policy_loss", "clip_fraction", "approx_kl")
        return {f"train/{name}": value.detach() for name, value in zip(names, self, strict=True)}


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
    clip_fraction = (weights * (clipped != plain)).sum()
    return PolicyLoss(loss, clip_fraction, approximate_kl(log_probs, old_log_probs, weights))


@torch.no_grad()
def approximate_kl(log_probs: Tensor, old_log_probs: Tensor, weights: Tensor) -> Tensor:
    """k3(pi_old || pi) of (n,) tokens that pi_old sampled, nats a token."""
    log_ratio = log_probs - old_log_probs
    # A token that left the support of a truncated distribution has ratio 0, and its log-ratio would drown the rest.
    return (weights * (log_ratio.exp() - 1 - log_ratio.clamp(min=-20.0))).sum()


def response_means(x: Tensor, positions: Tensor, lengths: Tensor, is_token: Tensor) -> Tensor:
    """(n,) for each token the mean of x over the tokens of its response, differentiable.

    Args:
        x: (n,), the tokens of a response next to each other. positions: (n,) int64 in the response, from 0.
        lengths: (n,) int64 tokens of the response. is_token: (n,) bool, False on copies that fill up a row.
    """
    response = (positions == 0).cumsum(0) - 1
    sums = torch.zeros_like(x).scatter_add(0, response, torch.where(is_token, x, 0.0))
    return sums.gather(0, response) / lengths


def clipped_sequence_loss(
    log_ratios: Tensor, advantages: Tensor, weights: Tensor, clip_range: float, clip_range_high: float
) -> PolicyLoss:
    """GSPO's clipped surrogate of whole responses (Zheng et al. 2025, eq. 5), negated.

    Args:
        log_ratios: (n,) for each token the mean log-ratio of its response, log s_i (eq. 7). advantages: (n,).
        weights: (n,), of all tokens of a response alike. clip_range, clip_range_high: of s_i, below and above 1.

    Returns:
        The loss, whose `approx_kl` is that of responses, a token.
    """
    return clipped_policy_loss(
        log_ratios, torch.zeros_like(log_ratios), advantages, weights, clip_range, clip_range_high
    )


def clipped_weight_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_range_high: float,
    clip_range: float | None = None,
) -> PolicyLoss:
    """CISPO: the policy gradient of each token, weighted with its clipped ratio (MiniMax 2025, eqs. 4 and 5), negated.

    The ratio is a constant, so every token has a gradient, wherever its ratio is.

    Args:
        log_probs: (n,) nats under the policy being updated. old_log_probs: (n,) under the one that sampled.
        advantages: (n,). weights: (n,). clip_range_high: the ratio is at most 1 plus this.
        clip_range: the ratio is at least 1 less this; None leaves it free below.
    """
    with torch.no_grad():
        ratio = (log_probs - old_log_probs).exp()
        clipped = ratio.clamp(None if clip_range is None else 1 - clip_range, 1 + clip_range_high)
        clip_fraction = (weights * (clipped != ratio)).sum()
    loss = policy_gradient_loss(log_probs, clipped * advantages, weights)
    return PolicyLoss(loss, clip_fraction, approximate_kl(log_probs, old_log_probs, weights))


class GatedLoss(NamedTuple):
    """`loss` to minimise, and the mean slope of the `gate`: 1 at ratio 1, 0 far from it."""

    loss: Tensor
    gate: Tensor


def soft_gated_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    temperature: float,
    temperature_negative: float,
) -> GatedLoss:
    """SAPO's surrogate with a sigmoid gate instead of a clip (Gao et al. 2025, section 3), negated.

    f(r) = 4 / tau * sigmoid(tau * (r - 1)), whose slope is 4 * sigmoid * (1 - sigmoid): 1 at r = 1.

    Args:
        log_probs: (n,) nats under the policy being updated. old_log_probs: (n,) under the one that sampled.
        advantages: (n,). weights: (n,). temperature: tau where the advantage is positive.
        temperature_negative: tau elsewhere.
    """
    # A ratio beyond e^20 has no slope left in the gate, and would overflow.
    ratio = (log_probs - old_log_probs).clamp(max=20.0).exp()
    tau = torch.full_like(advantages, temperature_negative).masked_fill(advantages > 0, temperature)
    share = torch.sigmoid(tau * (ratio - 1))
    loss = -(weights * advantages * share * 4 / tau).sum()
    return GatedLoss(loss, (weights * 4 * share * (1 - share)).sum().detach())


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
            docs/optimum.md has their bias, measured. For k2_to_go, which is of several tokens, see `kl_to_go`.
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


def kl_to_go(log_probs: Tensor, ref_log_probs: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    """k2 with the gradient of the KL between whole responses, as a loss: differentiable, nats.

    The gradient of k2 of a token is l_t grad log pi(a_t). A token also moves the KL of the states after it: with the
    log-ratios from t to the end instead of l_t, the mean over responses of the sum over tokens is grad KL(pi || pi_ref)
    (docs/optimum.md, eq. 11). That is on-policy: tokens of another policy would need its ratio.

    Args:
        log_probs: (n,) under the policy being updated, the tokens of a response next to each other.
        ref_log_probs: (n,). positions: (n,) int64 in the response, from 0. lengths: (n,) int64 of the response.

    Returns:
        (n,) with the value of k1, whose sum is the estimate of the KL; 0 for a token that left the support of a
        truncated distribution.
    """
    gone = log_probs == -torch.inf
    own = log_probs.masked_fill(gone, 0.0)
    log_ratio = (own - ref_log_probs).masked_fill(gone, 0.0).detach()
    so_far = log_ratio.double().cumsum(0)
    last = torch.arange(len(own), device=own.device) - positions + lengths - 1
    to_go = (so_far[last] - so_far).to(own.dtype) + log_ratio
    return log_ratio + to_go * (own - own.detach())


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
