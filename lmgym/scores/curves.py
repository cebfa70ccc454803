"""Scores along training: what a label has after so many steps or seconds, and when it has enough.

Shapes: K points of the grid, k gradings of a run, M tasks, n_m runs on task m.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.scores.aggregates import Statistic, statistic_named
from lmgym.scores.bands import BAND_RESAMPLES, Band, band_of
from lmgym.scores.bootstrap import tail
from lmgym.scores.matrix import ScoreMatrix

SHARES = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Curve:
    """The gradings of a run in their order: when, in steps or seconds or tokens, and the score, (k,) each."""

    clock: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class SolveTime:
    """When the runs of a label on a task were there: the median over runs, infinite if half of them never were."""

    median: float
    reached: int
    runs: int


@dataclass(frozen=True, eq=False)
class ScoreCurves:
    """A curve a run, by its label, its task and its seed."""

    runs: Mapping[tuple[str, str, int], Curve]

    @classmethod
    def from_columns(
        cls,
        *,
        label: Iterable[str],
        task: Iterable[str],
        seed: Iterable[int],
        clock: Iterable[float],
        score: Iterable[float],
    ) -> ScoreCurves:
        """From the columns of a table with one row a grading.

        Raises:
            InvalidArgumentError: if the columns differ in length, or a run has two gradings at one time.
        """
        columns = [list(column) for column in (label, task, seed, clock, score)]
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            raise InvalidArgumentError(
                f"`label`, `task`, `seed`, `clock`, `score` must have one length, got {lengths}."
            )
        rows: dict[tuple[str, str, int], dict[float, float]] = {}
        for row in zip(*columns, strict=True):
            gradings = rows.setdefault((str(row[0]), str(row[1]), int(row[2])), {})
            if float(row[3]) in gradings:
                raise InvalidArgumentError(f"`clock` must differ between the gradings of a run, got two of {row[:4]}.")
            gradings[float(row[3])] = float(row[4])
        curves = {}
        for run, gradings in rows.items():
            clocks = sorted(gradings)
            curves[run] = Curve(np.asarray(clocks), np.asarray([gradings[at] for at in clocks]))
        return cls(curves)

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(dict.fromkeys(run[0] for run in self.runs))

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(dict.fromkeys(run[1] for run in self.runs))

    def of(self, label: str, task: str) -> dict[int, Curve]:
        """The curves of a label on a task by their seeds."""
        check_choice("label", label, self.labels)
        check_choice("task", task, self.tasks)
        return {run[2]: curve for run, curve in self.runs.items() if run[:2] == (label, task)}

    def common_range(self, label: str) -> tuple[float, float]:
        """From when on, and until when, every run of a label has gradings."""
        clocks = [curve.clock for run, curve in self.runs.items() if run[0] == label]
        check_choice("label", label, self.labels)
        return max(float(clock[0]) for clock in clocks), min(float(clock[-1]) for clock in clocks)

    def at(self, when: float) -> ScoreMatrix:
        """The scores at one time, between two gradings on the line that joins them. A run that ended before failed."""
        runs = list(self.runs)
        scores = [score_at(self.runs[run], np.asarray([when]))[0] for run in runs]
        return ScoreMatrix.from_columns(
            label=[run[0] for run in runs], task=[run[1] for run in runs], seed=[run[2] for run in runs], score=scores
        )


def score_at(curve: Curve, when: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of a run at (K,) times; NaN after its last grading.

    Raises:
        InvalidArgumentError: if a time is before its first grading.
    """
    if len(when) and when.min() < curve.clock[0]:
        raise InvalidArgumentError(
            f"`when` must not be before the first grading of a run, at {curve.clock[0]:g}, got {when.min():g}."
        )
    return np.interp(when, curve.clock, curve.scores, right=math.nan)


def efficiency_curves(
    curves: ScoreCurves,
    statistic: str | Statistic = "iqm",
    *,
    grid: ArrayLike | None = None,
    failures_as: float | None = None,
    rng: np.random.Generator,
    resamples: int = BAND_RESAMPLES,
    expanded: bool = True,
) -> dict[str, Band]:
    """The aggregate over tasks along training, for every label, with an interval at each point (sample efficiency).

    Whole runs are resampled, so that the points of a curve move together as those of runs do.

    Args:
        curves: the gradings; every label needs a run on every task.
        statistic: as in `aggregate`.
        grid: (K,) times; None takes 50 from the first to the last at which every run of the label has a score.
        failures_as: the score of a run after its last grading; None makes it an error if `grid` goes beyond one.
        rng, resamples, expanded: of the bootstrap, as in `aggregate`.
    """
    function = statistic_named(statistic)
    found = {}
    for label in curves.labels:
        points = np.linspace(*curves.common_range(label), 50) if grid is None else np.asarray(grid, dtype=np.float64)
        strata = [_scores_on(curves, label, task, points, failures_as) for task in curves.tasks]
        chosen = [rng.integers(len(runs), size=(resamples, len(runs))) for runs in strata]
        value = function([runs.T for runs in strata])
        replicates = np.empty((resamples, len(points)))
        for i in range(len(points)):
            replicates[:, i] = function([runs[rows, i] for runs, rows in zip(strata, chosen, strict=True)])
        single = min(len(runs) for runs in strata) == 1
        outside = None
        if not single:
            outside = np.asarray([tail([runs[:, i] for runs in strata], expanded=expanded) for i in range(len(points))])
        found[label] = band_of(points, value, replicates, outside)
    return found


def solved_at(clock: ArrayLike, scores: ArrayLike, shares: Sequence[float] = SHARES) -> dict[float, float]:
    """When a run first had each share of the gain: the time of the first grading with a score at least that high.

    A score is the normalised return. No time is read between two gradings, and what happens later does not count.

    Args:
        clock: (k,) steps or seconds, in any order. scores: (k,).
        shares: of the gain V* - J_ref.

    Returns:
        The time by share; infinite where the run never was there.
    """
    times = np.asarray(clock, dtype=np.float64)
    values = np.asarray(scores, dtype=np.float64)
    if times.shape != values.shape:
        raise InvalidArgumentError(f"`scores` must have the shape of `clock`, {times.shape}, got {values.shape}.")
    return {share: float(times[values >= share].min(initial=math.inf)) for share in shares}


def solve_times(curves: ScoreCurves, share: float) -> dict[str, dict[str, SolveTime]]:
    """By label and task, when its runs first had a share of the gain. A task without runs of the label is left out."""
    found: dict[str, dict[str, SolveTime]] = {}
    for label in curves.labels:
        found[label] = {}
        for task in curves.tasks:
            runs = curves.of(label, task).values()
            times = [solved_at(curve.clock, curve.scores, (share,))[share] for curve in runs]
            if times:
                reached = sum(math.isfinite(time) for time in times)
                found[label][task] = SolveTime(statistics.median(times), reached, len(times))
    return found


def _scores_on(
    curves: ScoreCurves, label: str, task: str, points: NDArray[np.float64], failures_as: float | None
) -> NDArray[np.float64]:
    """(n_m, K)."""
    runs = curves.of(label, task)
    if not runs:
        raise InvalidArgumentError(
            f"`curves` must have a run of every label on every task, got none of {label!r} on {task!r}."
        )
    scores = np.stack([score_at(curve, points) for curve in runs.values()])
    if failures_as is not None:
        return np.where(np.isnan(scores), failures_as, scores)
    if np.isnan(scores).any():
        last = min(float(curve.clock[-1]) for curve in runs.values())
        raise InvalidArgumentError(
            f"`grid` must end where a run of {label!r} on {task!r} has its last score, at {last:g}, got "
            f"{points.max():g}. Say what a run counts as after its end with `failures_as`."
        )
    return scores
