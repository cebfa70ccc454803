"""95 % confidence intervals of means, right for few samples and for rare events too (docs/trust.md).

Shapes: n independent numbers; X prompts, R repeats of each; S samples a prompt, N = X S episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.95
RARE = 50  # fewer scores than this that differ from the commonest one make Student's interval wrong
_ROUNDING = 2e-6  # error of a float32 log-prob of a token, in nats, and of a score, as a share of it


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __repr__(self) -> str:
        if self.exact:
            return f"{self.mean:.4g} exact"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def exact(self) -> bool:
        """Whether the mean is known, not estimated: the interval has no width."""
        return self.low == self.high

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

    @classmethod
    def bounded(cls, numbers: Tensor, low: float, high: float) -> Interval:
        """Interval of the mean of (n,) independent numbers of which none can be below `low` or above `high`.

        The bounds of Gaffke (2005; Learned-Miller & Thomas 2020, arXiv 1905.06208): one more number is put at `high`,
        all n + 1 get random weights that are uniform over those that sum to 1 (a Dirichlet distribution), and the upper
        bound is the 97.5 % quantile of the weighted mean; the lower bound likewise. Of numbers that are `low` or `high`
        it is the interval of Clopper & Pearson (1934), which holds the mean at least as often as it says; for other
        numbers no exception is known. Numbers that are all alike still give (high - mean) * 3.69 / n: what was never
        seen may happen once in n times. With many numbers it becomes Student's.

        The numbers may have different means, as those of several prompts have: they then vary more, and the interval is
        wider than it needs to be (Hoeffding 1956 for two values).
        """
        numbers = numbers.detach().cpu().double()
        values, counts = np.unique(numbers.numpy(), return_counts=True)
        mean = numbers.mean().item()
        if not math.isfinite(mean):
            return cls(mean, mean, mean)
        upper = _weighted_quantile(np.append(values, high), np.append(counts, 1.0))
        lower = 0.0 - _weighted_quantile(np.append(-values, -low), np.append(counts, 1.0))
        return cls(mean, min(lower, mean), max(upper, mean))

    def widened(self, margin: float) -> Interval:
        """The same mean, in an interval that is wider by a margin on both sides."""
        return Interval(self.mean, self.low - margin, self.high + margin)


def t_quantile(freedom: float) -> float:
    """How many standard errors a two-sided 95 % interval reaches, at so many degrees of freedom; 1.96 at infinity."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def of_episodes(
    numbers: Mapping[str, Tensor],
    *,
    kl_coef: float,
    gamma: float,
    horizon: int,
    score_range: tuple[float, float] | None = None,
    whole: bool = True,
) -> dict[str, Interval]:
    """Intervals of what N episodes measured, S of each of X prompts.

    They are Student's t-intervals if at least 50 scores differ from the commonest one (half of the scores are enough if
    the range of the score is not known). Else scores are rare or samples few, and what was not seen may matter. They
    are then `Interval.bounded`, with these bounds:

    - of a score: `score_range`; if it is not known, 0, 1 and what was seen;
    - of the length: 1 and `horizon`;
    - of the KL: what was seen, and at least -log N and log N. Responses that make up a share q of the policy's have a
      mean log-ratio of at least log q (Jensen), and of at most log(1 / q) if the reference finds them once in q^-2;
    - of the return: those of the score and of the KL together.

    Args:
        numbers: (X, S) each: `return` and `score`; `length` if gamma < 1; and `kl` and other scores if there are any.
        kl_coef, gamma: of the task.
        horizon: T.
        score_range: the least and the largest score that can be paid; None if they are not known.
        whole: whether the prompts are all there are, so that only the noise of the samples counts. Otherwise, and at
            one sample a prompt, they are a sample of prompts, and the interval is over their means.
    """
    samples = numbers["score"].shape[1]
    over_samples = whole and samples > 1
    units = {name: (x if over_samples else x.mean(1, keepdim=True)).double() for name, x in numbers.items()}
    limits = _limits(numbers, kl_coef, gamma, horizon, score_range)
    score_is_rare = is_rare(units["score"], known=score_range is not None)
    log_prob_error = _ROUNDING * horizon
    score_error = _ROUNDING * units["score"].abs().max().item()
    errors = {"kl": log_prob_error, "return": kl_coef * log_prob_error + score_error, "length": 0.0}
    found = {}
    for name, x in units.items():
        rare = score_is_rare if name in ("return", "kl", "score") else is_rare(x, known=name == "length")
        if rare:
            found[name] = Interval.bounded(x.flatten(), *limits[name])
        else:
            found[name] = Interval.over_repeats(x) if over_samples else Interval.of(x.flatten())
        found[name] = found[name].widened(errors.get(name, _ROUNDING * x.abs().max().item()))
    return found


def is_rare(numbers: Tensor, *, known: bool) -> bool:
    """Whether so few numbers differ from the commonest one that Student's interval cannot be trusted.

    Args:
        numbers: any shape. known: whether their range is known; if not, half of them are enough.
    """
    _, counts = numbers.unique(return_counts=True)
    differing = numbers.numel() - int(counts.max())
    return differing < (RARE if known else min(RARE, numbers.numel() / 2))


def _limits(
    numbers: Mapping[str, Tensor],
    kl_coef: float,
    gamma: float,
    horizon: int,
    score_range: tuple[float, float] | None,
) -> dict[str, tuple[float, float]]:
    """The least and the largest value that `of_episodes` assumes of each number."""
    limits = {name: (min(x.min().item(), 0.0), max(x.max().item(), 1.0)) for name, x in numbers.items()}
    limits["length"] = (1.0, float(horizon))
    low, high = limits["score"] if score_range is None else score_range
    limits["score"] = (min(low, numbers["score"].min().item()), max(high, numbers["score"].max().item()))
    if "kl" not in numbers:
        limits["return"] = limits["score"]
        return limits
    nats = math.log(max(numbers["score"].numel(), 2))
    kl = numbers["kl"]
    limits["kl"] = (min(kl.min().item(), -nats), max(kl.max().item(), nats))
    low, high = limits["score"]
    paid = numbers["score"]
    if gamma < 1:  # the discount of a late score may be near 0
        low = min(low, 0.0)
        high = max(high, 0.0)
        paid = gamma ** (numbers["length"].double() - 1) * paid
    price = paid - numbers["return"]
    cheapest = min(price.min().item(), -kl_coef * nats)
    dearest = max(price.max().item(), kl_coef * nats)
    limits["return"] = (low - dearest, high - cheapest)
    return limits


def _weighted_quantile(values: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """The 97.5 % quantile of the mean of numbers under weights that are uniform over those that sum to 1.

    The weighted mean is above q with the probability that sum_i (x_i - q) E_i > 0, the E_i standard exponentials: it is
    taken from the saddlepoint approximation of Lugannani & Rice (1980). The bounds that come out are within 0.5 % of
    Clopper & Pearson's, on the outer side (tested).

    Args:
        values: (k,), distinct or not. counts: (k,) how often each is there.
    """
    from scipy.optimize import brentq

    top = float(values.max())
    scale = float(np.ptp(values))
    if scale <= 1e-12 * abs(top):
        return top
    below = (values - top) / scale  # in [-1, 0]
    log_rho = float(brentq(lambda x: _saddlepoint(below, counts, x)[1] - (1 - LEVEL) / 2, -30.0, 60.0, xtol=1e-9))
    return top + scale * _saddlepoint(below, counts, log_rho)[0]


def _saddlepoint(values: NDArray[np.float64], counts: NDArray[np.float64], log_rho: float) -> tuple[float, float]:
    """A number q, and the probability that the weighted mean of `values` (k,), none above 0, is above q.

    The cumulant generating function of sum_i (x_i - q) E_i is K(t) = -sum_i log(1 - t (x_i - q)). With
    rho = t / (1 + t q), the saddlepoint K'(t) = 0 is solved by q in closed form, from the mean to 0 as rho grows.
    """
    from scipy.special import ndtr

    rho = math.exp(log_rho)
    weights = counts / (1 - rho * values)
    q = float(weights @ values / weights.sum())
    t = rho / (1 - rho * q)
    rest = 1 - t * (values - q)
    w = math.sqrt(max(2 * float(counts @ np.log(rest)), 0.0))
    if w < 1e-3:
        return q, 0.5
    u = t * math.sqrt(float(counts @ ((values - q) / rest) ** 2))
    return q, float(ndtr(-w)) + math.exp(-w * w / 2) / math.sqrt(2 * math.pi) * (1 / u - 1 / w)
