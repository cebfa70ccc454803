"""What a comparison prints at its end: the share of the gain of each label on each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from agents.comparison.table import Run, Table
from agents.runs.sweeps import aligned
from lmgym.scores import student_interval


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
