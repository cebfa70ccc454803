"""One number for a label over all tasks, with its interval (Agarwal et al. 2021, arXiv 2108.13264).

Every task counts the same, however many runs it has. With as many runs on every task, these are rliable's definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.intervals import Interval
from lmgym.scores.bootstrap import RESAMPLES, percentile_interval, resample
from lmgym.scores.matrix import ScoreMatrix

Strata: TypeAlias = Sequence[NDArray[np.float64]]  # (..., n_m) for each of M tasks
Statistic: TypeAlias = Callable[[Strata], NDArray[np.float64]]


def interquartile_mean(strata: Strata) -> NDArray[np.float64]:
    """The mean of the runs that remain when the lowest and the highest quarter are gone, over all tasks together.

    Runs leave whole: of 10 runs, 2 at each end. A run weighs 1 / n_m, so that the quarter is one of the weight.

    Args:
        strata: (..., n_m) for every task m.
    """
    scores = np.concatenate(strata, axis=-1)
    weights = np.concatenate([np.full(runs.shape[-1], 1 / runs.shape[-1]) for runs in strata])
    order = np.argsort(scores, axis=-1, kind="stable")
    scores = np.take_along_axis(scores, order, -1)
    weights = weights[order]
    upto = np.cumsum(weights, -1)
    quarter = len(strata) / 4 + 1e-9
    kept = weights * ((upto > quarter) & (len(strata) - upto + weights > quarter))
    return (kept * scores).sum(-1) / kept.sum(-1)


def mean_score(strata: Strata) -> NDArray[np.float64]:
    """The mean over tasks of the mean over runs."""
    return _task_means(strata).mean(-1)


def median_score(strata: Strata) -> NDArray[np.float64]:
    """The median over tasks of the mean over runs."""
    return np.median(_task_means(strata), axis=-1)


def optimality_gap(strata: Strata, target: float = 1.0) -> NDArray[np.float64]:
    """How much is missing to the target on average; a score above the target makes up for nothing."""
    return target - mean_score([np.minimum(runs, target) for runs in strata])


STATISTICS: dict[str, Statistic] = {
    "iqm": interquartile_mean,
    "mean": mean_score,
    "median": median_score,
    "optimality_gap": optimality_gap,
}


def aggregate(
    matrix: ScoreMatrix,
    statistic: str | Statistic = "iqm",
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    expanded: bool = True,
) -> dict[str, Interval]:
    """A statistic of every label, with the 95 % interval of the stratified bootstrap.

    The interval is about other seeds on these tasks, not about other tasks.

    Args:
        matrix: the scores; every label needs a run on every task.
        statistic: a name of `STATISTICS`, or a function of the scores, (..., n_m) for each task m, that returns (...).
        rng: draws the resamples. resamples: how many.
        expanded: whether the interval is widened for few runs (`lmgym.scores.bootstrap.tail`); False is rliable's.
    """
    function = statistic_named(statistic)
    found = {}
    for label in matrix.labels:
        strata = matrix.strata(label)
        replicates = function(resample(strata, resamples, rng))
        found[label] = percentile_interval(float(function(strata)), replicates, strata, expanded=expanded)
    return found


def aggregate_gap(
    matrix: ScoreMatrix,
    label: str,
    over: str,
    statistic: str | Statistic = "iqm",
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    expanded: bool = True,
) -> Interval:
    """By how much the statistic of `label` is above that of `over`, with an interval as in `aggregate`."""
    if label == over:
        raise InvalidArgumentError(f"`over` must be another label, got {over!r} twice.")
    function = statistic_named(statistic)
    ours = matrix.strata(label)
    theirs = matrix.strata(over)
    replicates = function(resample(ours, resamples, rng)) - function(resample(theirs, resamples, rng))
    gap = float(function(ours) - function(theirs))
    return percentile_interval(gap, replicates, [*ours, *theirs], expanded=expanded)


def statistic_named(statistic: str | Statistic) -> Statistic:
    """A statistic by its name in `STATISTICS`, or itself."""
    if callable(statistic):
        return statistic
    check_choice("statistic", statistic, STATISTICS)
    return STATISTICS[statistic]


def _task_means(strata: Strata) -> NDArray[np.float64]:
    """(..., M)."""
    return np.stack([runs.mean(-1) for runs in strata], axis=-1)
