"""Advantages and returns of whole episodes: pure functions of (B, T) tensors, 0 off the mask.

Every estimator here has a slow, obvious twin in its test.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    Args:
        rewards: (B, T). values: (B, T), V(s_t) before token t. mask: (B, T) bool, a prefix of each row.
        gamma: discount a token. gae_lambda: 0 is one-step TD, 1 is Monte Carlo.
        bootstrap: (B,) V of the state after the last token, where an episode was truncated there; 0 elsewhere. None
            is 0: the end of a finite-horizon episode has no future.

    Returns:
        advantages (B, T), and returns (B, T) = advantages + values, the critic's target; 0 off the mask.
    """
    if rewards.is_cuda:  # where the loop would launch some ten operations a token
        return _gae_at_once(rewards, values, mask, gamma, gae_lambda, bootstrap)
    advantages = torch.zeros_like(rewards)
    last = rewards.new_zeros(rewards.shape[0])
    after = rewards.new_zeros(rewards.shape[0]) if bootstrap is None else bootstrap
    for t in reversed(range(rewards.shape[1])):
        alive = mask[:, t]
        delta = rewards[:, t] + gamma * after - values[:, t]
        last = torch.where(alive, delta + gamma * gae_lambda * last, last)
        advantages[:, t] = torch.where(alive, last, advantages[:, t])
        after = torch.where(alive, values[:, t], after)
    return advantages, torch.where(mask, advantages + values, 0.0)


def _gae_at_once(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same without a loop: advantages are sums of the TD errors that follow, (gamma * gae_lambda)^k of each."""
    t = torch.arange(rewards.shape[1], device=rewards.device)
    after = torch.cat([torch.where(mask, values, 0.0)[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if bootstrap is not None:
        is_last = mask & (t == mask.sum(-1, keepdim=True) - 1)
        after = torch.where(is_last, bootstrap.to(values.dtype).unsqueeze(1), after)
    errors = torch.where(mask, rewards + gamma * after - values, 0.0)
    ahead = t.unsqueeze(1) - t  # of the row's token from the column's
    decay = torch.where(ahead >= 0, (gamma * gae_lambda) ** ahead.clamp(min=0).to(rewards.dtype), 0.0)
    advantages = torch.where(mask, errors @ decay, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scales to standard deviation 1 over the mask, and shifts to mean 0 unless `shift_mean` is False; 0 off the mask.

    The variance is the biased one (divided by n), as in lm-human-preferences.
    """
    chosen = x[mask]
    mean = chosen.mean()
    variance = chosen.var(unbiased=False)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """(B, T) G_t = sum_{k >= t} gamma^(k-t) r_k of rewards (B, T); 0 off the mask, a prefix of each row."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def segment_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, size: int) -> Tensor:
    """(B, T) the rewards of a segment of `size` tokens and V after it, less V before it, at all tokens of the segment.

    For a segment that begins at token i, A = sum_{k < size} gamma^k r_{i+k} + gamma^size V(s_{i+size}) - V(s_i)
    (Kazemnejad et al. 2024, section 4). The last one ends with its response, where V is 0.

    Args:
        rewards: (B, T). values: (B, T), of which those at tokens 0, size, 2 size, ... are looked at.
        mask: (B, T) bool, a prefix of each row. gamma: discount a token. size: tokens of a segment.
    """
    horizon = rewards.shape[1]
    inside = torch.arange(horizon, device=rewards.device) % size
    before = torch.where(mask, values, 0.0)[:, ::size]
    after = torch.nn.functional.pad(before[:, 1:], (0, 1))
    discounted = torch.nn.functional.pad(torch.where(mask, rewards, 0.0) * gamma**inside, (0, -horizon % size))
    paid = discounted.view(len(rewards), -1, size).sum(2)
    advantages = (paid + gamma**size * after - before).repeat_interleave(size, dim=1)
    return torch.where(mask, advantages[:, :horizon], 0.0)


def leave_one_out(returns: Tensor, mask: Tensor) -> Tensor:
    """(B, T) for each entry the mean of the other episodes' entries at the same position; 0 where there is none."""
    others = mask.sum(0, keepdim=True) - mask.to(returns.dtype)
    total = (returns * mask).sum(0, keepdim=True) - returns * mask
    return torch.where(mask, total / others.clamp(min=1), 0.0)


def group_leave_one_out(returns: Tensor, group_size: int) -> Tensor:
    """(B,) returns less the mean of the others in each group of `group_size` neighbours (Kool et al. 2019)."""
    groups = returns.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) * group_size / (group_size - 1)).flatten()


def group_standardised(returns: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """(B,) returns less the mean of their group, over its standard deviation (of n - 1) if `scale`.

    A group whose returns are all equal gets 0.
    """
    groups = returns.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def batch_standardised(returns: Tensor, group_size: int) -> Tensor:
    """(B,) returns less the mean of their group, over the root mean square of all these differences."""
    centred = group_standardised(returns, group_size, scale=False)
    return centred / (centred.square().mean().sqrt() + 1e-4)


def group_baseline(returns: Tensor, totals: Tensor, group_size: int) -> Tensor:
    """(B, T) returns-to-go less the mean of the whole returns (B,) of their group."""
    means = totals.view(-1, group_size).mean(1).repeat_interleave(group_size)
    return returns - means.unsqueeze(1)


def soft_overlong_penalty(lengths: Tensor, horizon: int, cache: int) -> Tensor:
    """(B,) what DAPO adds to the score of a long response (Yu et al. 2025, eq. 13): 0 down to -1.

    Args:
        lengths: (B,) tokens of responses. horizon: the most that a response may have.
        cache: the last tokens before it, over which the penalty falls from 0 to -1.
    """
    return ((horizon - cache - lengths) / cache).clamp(-1.0, 0.0)


def mixed_groups(scores: Tensor, group_size: int) -> Tensor:
    """(B / group_size,) bool: whether the scores (B,) of a group are not all equal (Yu et al. 2025, eq. 11)."""
    groups = scores.view(-1, group_size)
    return (groups != groups[:, :1]).any(1)
