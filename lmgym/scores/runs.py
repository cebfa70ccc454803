"""What a label does task by task and run by run: its mean, how far its runs spread, its worst, how often it fails.

Patterson et al. (2024, "Empirical design in reinforcement learning") say why a mean with its interval is not enough: it
is about the average of many runs, and whoever trains once gets one run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc, betaincinv, chdtri, ndtri

from lmgym.errors import InvalidArgumentError, check_choice, check_number
from lmgym.intervals import LEVEL, Interval, t_quantile
from lmgym.scores.matrix import ScoreMatrix


@dataclass(frozen=True)
class ToleranceInterval:
    """Where at least `share` of all runs lie, with this `confidence`, and the method that says so."""

    low: float
    high: float
    share: float
    confidence: float
    method: str


@dataclass(frozen=True)
class WorstRun:
    """The run with the lowest score; NaN is the score of a run that did not finish, and lower than any."""

    seed: int
    score: float


def task_intervals(matrix: ScoreMatrix) -> dict[str, dict[str, Interval]]:
    """The mean over runs by label and task, with Student's 95 % interval; infinite for one run."""
    found: dict[str, dict[str, Interval]] = {}
    for label in matrix.labels:
        strata = zip(matrix.tasks, matrix.strata(label), strict=True)
        found[label] = {task: student_interval(runs) for task, runs in strata}
    return found


def student_interval(numbers: ArrayLike) -> Interval:
    """Student's 95 % interval of the mean of (n,) independent numbers."""
    x = np.asarray(numbers, dtype=np.float64)
    mean = float(x.mean())
    half = math.inf
    if len(x) > 1:
        half = t_quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def tolerance_interval(
    scores: ArrayLike, share: float = 0.9, confidence: float = 0.95, *, method: str | None = None
) -> ToleranceInterval:
    """Two ends between which at least `share` of all runs lie, found with `confidence` from (n,) runs.

    There are two methods:

    - "order": two of the scores themselves, for any continuous distribution (Wilks 1941). It needs many: 46 runs for
      90 % of them with 95 % confidence.
    - "normal": mean +- k standard deviations, k as in Howe (1969). It is right for normal scores only: scores that end
      at an optimum, or come in two heaps, are not.

    None takes "order" where there are runs enough for it, else "normal". One run gives an infinite interval.
    """
    check_number("share", share, 0, 1, open_low=True, open_high=True)
    check_number("confidence", confidence, 0, 1, open_low=True, open_high=True)
    x = np.sort(np.asarray(scores, dtype=np.float64))
    outside = _runs_outside(len(x), share, confidence)
    if method is None:
        method = "order" if outside >= 2 else "normal"
    check_choice("method", method, ("order", "normal"))
    if method == "normal":
        half = math.inf
        if len(x) > 1:
            half = _normal_factor(len(x), share, confidence) * float(x.std(ddof=1))
        return ToleranceInterval(float(x.mean()) - half, float(x.mean()) + half, share, confidence, method)
    if outside < 2:
        raise InvalidArgumentError(
            f"`scores` must be more runs for the method 'order' at share {share:g} and confidence {confidence:g}, "
            f"got {len(x)}."
        )
    below = outside // 2
    above = outside - below
    return ToleranceInterval(float(x[below - 1]), float(x[len(x) - above]), share, confidence, method)


def worst_runs(matrix: ScoreMatrix) -> dict[str, dict[str, WorstRun]]:
    """By label and task the run with the lowest score. A task on which a label has no run is left out."""
    found: dict[str, dict[str, WorstRun]] = {}
    for label in matrix.labels:
        found[label] = {}
        for task in matrix.tasks:
            cell = matrix.cell(label, task)
            if cell:
                seed = min(cell, key=lambda seed: -math.inf if math.isnan(cell[seed]) else cell[seed])
                found[label][task] = WorstRun(seed, cell[seed])
    return found


def failure_rates(matrix: ScoreMatrix, below: float = 0.0) -> dict[str, Interval]:
    """The share of a label's runs, over all tasks, that did not finish or have a score below a number.

    The interval is that of Clopper & Pearson (1934): five runs without a failure may well fail once in two. Where tasks
    differ in how often runs fail it is wider than it needs to be (Hoeffding 1956).

    Args:
        matrix: the scores, failed runs among them.
        below: the number; 0 of a normalised score is the reference, which no training should go below.
    """
    check_number("below", below, -math.inf)
    found = {}
    for label in matrix.labels:
        scores = np.asarray([score for task in matrix.tasks for score in matrix.cell(label, task).values()])
        failures = int((np.isnan(scores) | (scores < below)).sum())
        found[label] = share_interval(failures, len(scores))
    return found


def share_interval(count: int, total: int) -> Interval:
    """The 95 % interval of Clopper & Pearson (1934) of the probability of what happened so often of so many times."""
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    outside = (1 - LEVEL) / 2
    low = float(betaincinv(count, total - count + 1, outside)) if count else 0.0
    high = float(betaincinv(count + 1, total - count, 1 - outside)) if count < total else 1.0
    return Interval(count / total, low, high)


def _runs_outside(runs: int, share: float, confidence: float) -> int:
    """How many gaps between runs, of the n + 1 that n runs make, may lie outside of the interval.

    The share of the distribution in all but m gaps is Beta(n + 1 - m, m), whatever the distribution.
    """
    outside = 0
    while outside < runs and 1 - betainc(runs - outside, outside + 1, share) >= confidence:
        outside += 1
    return outside


def _normal_factor(runs: int, share: float, confidence: float) -> float:
    """Howe's factor: standard deviations of a sample that hold a share of a normal distribution."""
    freedom = runs - 1
    spread = freedom / float(chdtri(freedom, confidence))  # chdtri: the number that chi2 exceeds with this probability
    return float(ndtri((1 + share) / 2)) * math.sqrt(spread * (1 + 1 / runs))
