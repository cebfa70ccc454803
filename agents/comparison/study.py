"""What the runs of a table say together: the statistics of the report, all of them from `lmgym.scores`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.comparison.sensitivity import Sensitivity
from agents.comparison.table import FAILED, Run, Table
from lmgym.intervals import Interval
from lmgym.scores import (
    STATISTICS,
    Band,
    PairComparison,
    ScoreMatrix,
    aggregate,
    compare_pairs,
    failure_rates,
    performance_profiles,
    student_interval,
)

SEED = 0  # of the bootstrap: the same runs give the same report
FAILURE_COUNTS_AS = 0.0  # of the gain: the reference
_PROFILE = np.linspace(-0.2, 1.05, 101)


@dataclass(frozen=True)
class Study:
    """Runs and what follows from them.

    Attributes:
        table: of all runs.
        labels: all that have a finished run, the best first. tasks: all with one, the easiest first.
        matrix: the shares of the gain of the labels and tasks that can be compared: every one of these labels has a run
            on every one of these tasks. A failed run counts as the reference. None where no share is known.
        aggregates: by statistic and label. pairs: every two labels of the matrix. profiles: by label.
        failures: the share of runs that failed or ended below the reference, by label.
        tuning: what tuning has made of the agents, where they were tuned.
    """

    table: Table
    labels: tuple[str, ...]
    tasks: tuple[str, ...]
    matrix: ScoreMatrix | None
    aggregates: Mapping[str, Mapping[str, Interval]]
    pairs: Mapping[tuple[str, str], PairComparison]
    profiles: Mapping[str, Band]
    failures: Mapping[str, Interval]
    tuning: Sequence[Sensitivity] = ()

    def cell(self, label: str, task: str, metric: str = "normalised") -> Interval | None:
        """The mean of a metric over the finished runs of a label on a task, with Student's interval."""
        return over_runs(self.table.of(label, task), metric)

    def pair(self, label: str, over: str) -> PairComparison:
        """The comparison of two labels of the matrix, in either order."""
        if (label, over) in self.pairs:
            return self.pairs[label, over]
        found = self.pairs[over, label]
        return PairComparison(
            Interval(-found.gap.mean, -found.gap.high, -found.gap.low),
            Interval(1 - found.improvement.mean, 1 - found.improvement.high, 1 - found.improvement.low),
            found.p_value,
            found.adjusted,
        )


def over_runs(runs: Sequence[Run], metric: str) -> Interval | None:
    """The mean over runs of a metric of the grading after training, with Student's interval; None without a run."""
    found = [run.graded(metric) for run in runs]
    means = [interval.mean for interval in found if interval is not None]
    return student_interval(means) if means else None


def study_of(table: Table, tuning: Sequence[Sensitivity] = ()) -> Study:
    """Computes the statistics of a table; `tuning` is what tuning has made of its agents."""
    whole = matrix_of(table)
    matrix = None if whole is None else comparable_part(whole)
    found: dict[str, dict[str, Interval]] = {}
    pairs: dict[tuple[str, str], PairComparison] = {}
    profiles: dict[str, Band] = {}
    failures: dict[str, Interval] = {}
    if matrix is not None:
        failures = failure_rates(matrix)
        matrix = matrix.with_failures_as(FAILURE_COUNTS_AS)
        found = {name: aggregate(matrix, name, rng=np.random.default_rng(SEED)) for name in STATISTICS}
        order = sorted(matrix.labels, key=lambda label: -found["mean"][label].mean)
        matrix = matrix.select(labels=order)
        if len(order) > 1:
            pairs = compare_pairs(matrix, "mean", rng=np.random.default_rng(SEED))
        profiles = performance_profiles(matrix, _PROFILE, rng=np.random.default_rng(SEED))
    labels = [] if matrix is None else list(matrix.labels)
    labels += sorted(set(table.labels()) - set(labels))
    tasks = tuple(_by_difficulty(table))
    return Study(table, tuple(labels), tasks, matrix, found, pairs, profiles, failures, tuning)


def matrix_of(table: Table) -> ScoreMatrix | None:
    """The shares of the gain of all runs that finished or failed; None where no share is known."""
    known = {run.task for run in table.finished if run.graded("normalised") is not None}
    runs = [run for run in table.runs if run.task in known and (run.finished or run.state == FAILED)]
    scores = []
    cells = set()
    counted = []
    for run in runs:
        share = run.graded("normalised") if run.finished else None
        cell = (run.label, run.task, run.seed)
        if run.seed is None or cell in cells or (run.finished and share is None):
            continue
        cells.add(cell)
        counted.append(run)
        scores.append(math.nan if share is None else share.mean)
    if not counted:
        return None
    return ScoreMatrix.from_columns(
        label=[run.label for run in counted],
        task=[run.task for run in counted],
        seed=[run.seed for run in counted if run.seed is not None],
        score=scores,
    )


def comparable_part(matrix: ScoreMatrix) -> ScoreMatrix:
    """The largest part of a matrix in which every label has a run on every task."""
    tasks_of = {label: frozenset(t for t in matrix.tasks if matrix.cell(label, t)) for label in matrix.labels}
    shared = set(tasks_of.values())
    shared |= {a & b for a in shared for b in shared}
    best: tuple[int, int] = (0, 0)
    chosen: tuple[list[str], list[str]] = ([], [])
    for tasks in sorted(shared, key=sorted):
        labels = [label for label in matrix.labels if tasks and tasks <= tasks_of[label]]
        size = (len(labels) * len(tasks), len(labels))
        if size > best:
            best = size
            chosen = (labels, [task for task in matrix.tasks if task in tasks])
    return matrix.select(labels=chosen[0], tasks=chosen[1])


def _by_difficulty(table: Table) -> list[str]:
    """The tasks, those first of which the labels get the most; last those of which no share is known."""

    def missing(task: str) -> float:
        shares = [over_runs(table.of(label, task), "normalised") for label in table.labels()]
        means = [share.mean for share in shares if share is not None]
        return 1 - float(np.mean(means)) if means else math.inf

    return sorted(table.tasks(), key=missing)
