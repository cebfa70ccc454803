"""How likely a run of one label is better than a run of another, on a task drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.intervals import LEVEL, Interval
from lmgym.scores.bootstrap import RESAMPLES, percentile_interval, resample
from lmgym.scores.matrix import ScoreMatrix

METHODS = ("score", "bootstrap")


def probability_of_improvement(
    matrix: ScoreMatrix,
    label: str,
    over: str,
    *,
    method: str = "score",
    rng: np.random.Generator | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """P(a run of `label` scores higher than a run of `over`), a tie counted half, averaged over tasks.

    On a task it is the statistic of Mann & Whitney (1947) over the number of pairs of runs. 1/2 says that the two are
    alike in this respect. Its interval:

    - "score": all probabilities p that the runs do not contradict at 5 %. Its variance at p is that of Newcombe (2006,
      method 5), which is exact at p = 1/2 where both labels have the same distribution. It is taken at the mean over
      tasks, where it is largest: the interval is wider than it needs to be where tasks disagree. It has a width where
      every run of one label beats every run of the other.
    - "bootstrap": the stratified percentile bootstrap, as rliable has it. It is too narrow with few seeds on few tasks,
      and has no width where one label always wins.

    Args:
        matrix: the scores. label, over: the two labels.
        method: of the interval. rng, resamples: for "bootstrap" only.
    """
    check_choice("method", method, METHODS)
    if label == over:
        raise InvalidArgumentError(f"`over` must be another label, got {over!r} twice.")
    ours = matrix.strata(label)
    theirs = matrix.strata(over)
    estimate = float(mean_win_share(ours, theirs))
    if method == "score":
        sizes = [(len(x), len(y)) for x, y in zip(ours, theirs, strict=True)]
        return Interval(estimate, _score_end(estimate, 0.0, sizes), _score_end(estimate, 1.0, sizes))
    if rng is None:
        raise InvalidArgumentError("`rng` must be a generator for the method 'bootstrap', got None.")
    replicates = mean_win_share(resample(ours, resamples, rng), resample(theirs, resamples, rng))
    return percentile_interval(estimate, replicates, [*ours, *theirs], expanded=False)


def mean_win_share(ours: Sequence[NDArray[np.float64]], theirs: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The share of pairs of runs that `ours` wins, ties half, averaged over tasks: (..., n_m) each, returns (...)."""
    return np.mean([win_share(x, y) for x, y in zip(ours, theirs, strict=True)], axis=0)


def win_share(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of pairs that `ours` (..., n) wins over `theirs` (..., k), ties half: (...)."""
    won = (ours[..., :, None] > theirs[..., None, :]).mean((-1, -2))
    lost = (ours[..., :, None] < theirs[..., None, :]).mean((-1, -2))
    return 0.5 + (won - lost) / 2


def _score_end(estimate: float, end: float, sizes: Sequence[tuple[int, int]]) -> float:
    """The probability nearest to `end`, 0 or 1, that is within 1.96 of its own standard errors of the estimate.

    The estimate is a multiple of a smallest step, which the normal distribution is not: half a step is added.
    """
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2)
    half_step = 0.5 * sum(1 / (ours * theirs) for ours, theirs in sizes) / len(sizes) ** 2
    start = estimate + half_step * (1 if end else -1)
    if not 0 < start < 1:
        return end

    def excess(p: float) -> float:
        return (start - p) ** 2 - reach**2 * _variance(p, sizes)

    return float(brentq(excess, start, end, xtol=1e-12))


def _variance(p: float, sizes: Sequence[tuple[int, int]]) -> float:
    """The variance of the mean over tasks of Mann & Whitney's share, of which each task has the expectation p."""
    total = 0.0
    for ours, theirs in sizes:
        half = (ours + theirs) / 2 - 1
        spread = 1 + half * ((1 - p) / (2 - p) + p / (1 + p))
        total += p * (1 - p) * spread / (ours * theirs)
    return total / len(sizes) ** 2
