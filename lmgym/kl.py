"""KL between the policy and the reference: estimators, the reward it makes, and its coefficient.

Throughout, `log_ratio` is log pi(a|s) - log pi_ref(a|s) of tokens that pi sampled, in nats. Estimators k1, k2, k3 are
Schulman's ("Approximating KL divergence", 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LogProbError, check_number

_MIN_LOG_PROBABILITY = math.log(1e-9)  # of a sum of log-ratios, in nats


def k1(log_ratio: Tensor) -> Tensor:
    """log pi/pi_ref: unbiased for KL(pi || pi_ref), of either sign. Any shape in, the same shape out."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, never negative.

    Its gradient is an unbiased gradient of the KL where the log-ratio is that of a whole response. Summed token by
    token it leaves out what an action does to the KL of later states (docs/optimum.md has the bias, measured).
    """
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-x) - 1 + x: unbiased and never negative."""
    return torch.expm1(-log_ratio) + log_ratio


def exact(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KL(pi || pi_ref) over the whole vocabulary.

    Args:
        log_probs: (..., V) normalised log-probs of the policy; -inf where it never goes.
        ref_log_probs: (..., V) the same of the reference.

    Returns:
        (...) nats.
    """
    log_ratio = (log_probs - ref_log_probs).masked_fill(log_probs == -torch.inf, 0.0)
    return (log_probs.exp() * log_ratio).sum(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of (..., V) normalised log-probs, in nats; zero probabilities count as zero."""
    # Filled before the product, not after: 0 * -inf would leave nan in the gradient.
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def token_rewards(episodes: Episodes, kl_coef: float, *, dense: bool = True) -> Tensor:
    """The full reward r_t of the design, both halves of the KL included (Ziegler et al. 2019, eq. 2, token by token).

    Args:
        episodes: B of them.
        kl_coef: price of a nat.
        dense: False pays the KL of the whole episode with the last reward.

    Returns:
        (B, T): `kl_coef * (log pi_ref - log pi)` at every chosen token, plus the score at the last one; 0 off the mask.
    """
    rewards = kl_coef * (episodes.ref_log_probs - episodes.log_probs) * episodes.response_mask
    end = episodes.scores.to(rewards.dtype)
    if not dense:
        end = end + rewards.sum(-1)
        rewards = torch.zeros_like(rewards)
    last = (episodes.lengths - 1).clamp(min=0).unsqueeze(1)
    return rewards.scatter_add(1, last, end.unsqueeze(1))


def episode_kl(episodes: Episodes) -> Tensor:
    """(B,) nats: the k1 estimate of each episode's KL, summed over its tokens."""
    return ((episodes.log_probs - episodes.ref_log_probs) * episodes.response_mask).sum(-1)


def discounted_return(rewards: Tensor, gamma: float) -> Tensor:
    """(B,): sum_t gamma^t r_t of (B, T) rewards that are 0 after the end."""
    discounts = gamma ** torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)
    return (rewards * discounts).sum(-1)


def check_kl_is_plausible(kl: Tensor) -> None:
    """Raises where a batch's mean KL cannot be that of log-probs with which the tokens were drawn.

    A KL is never negative. A k1 mean far below 0 therefore means that the tokens were drawn with other log-probs (a
    forgotten temperature, a stale policy). Far means two things: more than three standard errors (and more than
    round-off), and a sum of log-ratios that has a probability below 1e-9. If the log-probs are right, then
    E prod_i pi_ref(y_i|x_i) / pi(y_i|x_i) <= 1, so that sum_i log pi/pi_ref < -c has probability e^-c at most (Markov).
    Three standard errors alone happen often where few responses hold most of the KL and none of them was drawn.

    Args:
        kl: (B,) nats, the k1 estimate of each episode, independent given their prompts.

    Raises:
        LogProbError: saying the mean and its standard error.
    """
    if kl.numel() < 2 or kl.sum().item() >= _MIN_LOG_PROBABILITY:
        return
    mean = kl.mean().item()
    error = kl.std().item() / kl.numel() ** 0.5
    if mean < -3 * error - 1e-3:
        raise LogProbError(
            f"The mean KL(pi || pi_ref) is {mean:.3f} nats with standard error {error:.3f}, and a KL is never "
            "negative: the tokens were not drawn with these `log_probs` (temperature, top-k and top-p included)."
        )


class KLCoefficient(Protocol):
    """What multiplies the KL in the reward: `value` now, and `update` after each batch."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Sees the mean KL of a batch (nats an episode) and how many episodes it had."""


@dataclass
class FixedKL:
    """A coefficient that stays."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Changes nothing."""


@dataclass
class AdaptiveKL:
    """Ziegler et al. (2019), section 2.2: a log-space proportional controller of the coefficient.

    Attributes:
        value: the coefficient, at first its initial value.
        target: the KL to hold, nats an episode (a sum over tokens, not a mean).
        horizon: episodes; the larger, the slower.
    """

    value: float
    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        check_number("kl_target", self.target, 0, open_low=True)
        check_number("kl_horizon", self.horizon, 0, open_low=True)
        if self.value <= 0:
            raise InvalidArgumentError(f"`kl_coef` must be > 0 for an adaptive coefficient, got {self.value!r}.")

    def update(self, kl: float, episodes: int) -> None:
        """Multiplies by 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * episodes / self.horizon
