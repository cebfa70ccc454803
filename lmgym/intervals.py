"""95 % confidence intervals of means.

Shapes: n independent numbers; X prompts, R repeats (samples) of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def point(cls, value: float) -> Interval:
        """A number that is known exactly."""
        return cls(value, value, value)

    @classmethod
    def of(cls, per_cluster: Tensor) -> Interval:
        """Student's t-interval of the mean of (n,) independent numbers: one a prompt, its samples averaged before."""
        x = per_cluster.double()
        mean = x.mean().item()
        if len(x) == 1:
            return cls(mean, -math.inf, math.inf)
        half = t_quantile(len(x) - 1) * x.std().item() / math.sqrt(len(x))
        return cls(mean, mean - half, mean + half)

    @classmethod
    def over_repeats(cls, per_repeat: Tensor) -> Interval:
        """Student's t-interval of the mean over X fixed prompts of (X, R) numbers, each measured R times.

        Only the noise of the samples is in it, sqrt(sum_x var_x / R) / X: the prompts are all there are, not a sample
        of more. Its degrees of freedom are those of Welch (1947) and Satterthwaite (1946), for the variances of the
        prompts differ: from R - 1, where one prompt has all the variance, to X (R - 1).
        """
        x = per_repeat.double()
        prompts, repeats = x.shape
        mean = x.mean().item()
        if repeats == 1:
            return cls(mean, -math.inf, math.inf)
        if not math.isfinite(mean):
            return cls(mean, mean, mean)
        variances = x.var(1)
        total = variances.sum().item()
        if total == 0:
            return cls.point(mean)
        freedom = (repeats - 1) * total**2 / variances.square().sum().item()
        half = t_quantile(freedom) * math.sqrt(total / repeats) / prompts
        return cls(mean, mean - half, mean + half)


def t_quantile(freedom: float) -> float:
    """How many standard errors a two-sided 95 % interval reaches, at so many degrees of freedom; 1.96 at infinity."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
