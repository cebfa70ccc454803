"""Bounds on the optimum V* of a task at gamma = 1, from samples (design, section 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import episode_kl


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, per_cluster: Tensor) -> Interval:
        """Normal interval of the mean of (n,) independent numbers: one a prompt, its samples averaged before."""
        x = per_cluster.double()
        mean = x.mean().item()
        half = 1.96 * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.inf
        return cls(mean, mean - half, mean + half)


def log_weights(episodes: Episodes, kl_coef: float) -> Tensor:
    """(B,) log [pi_ref(y|x) / pi(y|x) * exp(score / kl_coef)]; at pi = pi* it is V*(x) / kl_coef for every y."""
    if kl_coef <= 0:
        raise InvalidArgumentError(f"`kl_coef` must be > 0 for a bound on the optimum, got {kl_coef!r}.")
    return episodes.scores.double() / kl_coef - episode_kl(episodes).double()


def multi_sample_bound(weights: Tensor, kl_coef: float, n: int | None = None) -> Tensor:
    """Lower bound on V*(x) from n samples a prompt (Burda et al. 2016, eq. 8, for this problem).

    `kl_coef * log mean_{i<=n} weight_i` is J(pi) at n = 1 in expectation, never falls with n, and never passes V*(x).

    Args:
        weights: (X, S) `log_weights` of S samples of each of X prompts.
        kl_coef: the price of a nat.
        n: a divisor of S; the bound is averaged over the S / n disjoint groups. None is S.

    Returns:
        (X,) bound of each prompt, in units of the score.
    """
    prompts, samples = weights.shape
    n = samples if n is None else n
    if n < 1 or samples % n:
        raise InvalidArgumentError(f"`n` must divide the {samples} samples of a prompt, got {n}.")
    groups = weights.view(prompts, samples // n, n)
    return kl_coef * (torch.logsumexp(groups, dim=-1) - math.log(n)).mean(-1)
