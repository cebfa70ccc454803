"""What a comparison prints at its end: the share of the gain of each label on each task, and a line a pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from agents.comparison.table import Run, Table
from agents.runs.sweeps import aligned
from lmgym.intervals import Interval
from lmgym.scores import ScoreMatrix, compare_pairs, student_interval

_SEED = 0  # of the bootstrap: the same runs give the same lines
_SURE = 0.05


def results_table(table: Table) -> str:
    """A line a label: means over seeds with Student's intervals, of the share of the gain or of J."""
    tasks = list(dict.fromkeys(run.task for run in table.runs))
    rows = [["share of the gain", *tasks, "seeds"]]
    for label in dict.fromkeys(run.label for run in table.runs):
        own = [run for run in table.runs if run.label == label]
        counts = {sum(run.task == task and run.finished for run in own) for task in tasks}
        failed = sum(run.state == "failed" for run in own)
        seeds = "-".join(map(str, sorted({min(counts), max(counts)})))
        more = f", {failed} failed" if failed else ""
        rows.append([label, *(_cell([r for r in own if r.task == task]) for task in tasks), f"{seeds}{more}"])
    return aligned(rows)


def _cell(runs: Sequence[Run]) -> str:
    """Of the runs of a label on a task."""
    shares = [share_of(run) for run in runs if run.finished]
    known = [share for share in shares if share is not None]
    if known and len(known) == len(shares):
        return shown(known)
    returns = [run.graded("return") for run in runs if run.finished]
    means = [value.mean for value in returns if value is not None]
    return f"J = {shown(means)}" if means else "-"


def share_of(run: Run) -> float | None:
    """The share of the gain of a finished run; None where V* is not known."""
    found = run.graded("normalised")
    return None if found is None or not math.isfinite(found.mean) else found.mean


def shown(numbers: Sequence[float]) -> str:
    """Mean and half-width of the 95 % t-interval; of one number itself."""
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    interval = student_interval(numbers)
    return f"{fmean(numbers):.3f} ± {interval.high - interval.mean:.3f}"


def verdict_lines(table: Table) -> list[str]:
    """A line a pair of labels, over the tasks on which V* is known and both have two finished runs or more."""
    matrix = _matrix(table)
    if matrix is None:
        return []
    lines = []
    for (one, other), pair in compare_pairs(matrix, "mean", rng=np.random.default_rng(_SEED), resamples=2000).items():
        better = one
        worse = other
        gap = pair.gap
        if gap.mean < 0:
            better = other
            worse = one
            gap = Interval(-gap.mean, -gap.high, -gap.low)
        says = "is better than" if pair.adjusted <= _SURE else "is not told apart from"
        by = f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] of the gain"
        lines.append(f"{better} {says} {worse}: {by} on average, p = {pair.adjusted:.3f} after Holm")
    return lines


def _matrix(table: Table) -> ScoreMatrix | None:
    """The shares of the labels and tasks of which every pair has two seeds or more; None of fewer than two labels."""
    labels = list(dict.fromkeys(run.label for run in table.runs))
    tasks = [task for task in table.tasks() if all(_count(table.of(label, task)) > 1 for label in labels)]
    runs = [run for run in table.finished if run.task in tasks and share_of(run) is not None]
    if len(labels) < 2 or not tasks:
        return None
    return ScoreMatrix.from_columns(
        label=[run.label for run in runs],
        task=[run.task for run in runs],
        seed=[int(run.seed or 0) for run in runs],
        score=[share_of(run) or 0.0 for run in runs],
    )


def _count(runs: Iterable[Run]) -> int:
    return sum(share_of(run) is not None for run in runs)
