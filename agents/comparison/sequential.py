"""Seeds that are added in groups until every pair of agents is decided: `python -m agents.compare max_seeds=30`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agents.comparison.plan import Cell, labels_of
from agents.comparison.protocol import Protocol
from lmgym.errors import InvalidArgumentError

if TYPE_CHECKING:
    from agents.comparison.verdict import Rule
    from lmgym.scores import SequentialPlan, SequentialResult, Verdict


@dataclass(frozen=True)
class Ended:
    """How far the adding of seeds has come.

    Attributes:
        code: the exit code. cells: the runs of all groups so far.
        found: what the last look has found; None where it was stopped before, or nothing can be decided.
    """

    code: int
    cells: list[Cell]
    found: SequentialResult | None


def plan_of(protocol: Protocol) -> SequentialPlan:
    """The plan that a protocol fixes: a group is as many seeds as `seeds` says."""
    from lmgym.scores import SequentialPlan

    assert protocol.max_seeds is not None
    group = len(protocol.seeds)
    return SequentialPlan(group, protocol.max_seeds // group, protocol.margin)


def run_until_decided(protocol: Protocol, every: Sequence[Cell], run: Callable[[Sequence[Cell]], int]) -> Ended:
    """Runs a group of seeds of every agent that is in an open pair, looks, and so on.

    What is finished is not run again: the same command takes the same looks at the same runs, and goes on.

    Args:
        protocol: what is compared. every: the runs of all seeds that there may be.
        run: runs what is missing, and returns the exit code, which is above 1 where it was stopped.

    Raises:
        InvalidArgumentError: for a task whose optimum is not known, or where there is one label alone.
    """
    plan = plan_of(protocol)
    labels = labels_of(every)
    if len(set(labels)) < 2:
        raise InvalidArgumentError(f"`agents` must be two at least with `max_seeds`, got {labels[0]}.")
    wanted = dict.fromkeys(labels, plan.group)
    failed = 0
    while True:
        cells = [cell for cell, label in zip(every, labels, strict=True) if cell.seed < wanted[label]]
        code = run(cells)
        if code > 1:
            return Ended(code, cells, None)
        failed = max(failed, code)
        found = look(cells, plan)
        if found is None:
            print("\nNothing can be decided: on a task every run has failed.", flush=True)
            return Ended(failed, cells, None)
        if found.finished:
            return Ended(failed, cells, found)
        print(f"\n{standing(found)}", flush=True)
        wanted |= found.wanted


def look(cells: Sequence[Cell], plan: SequentialPlan) -> SequentialResult | None:
    """What the runs so far decide; a failed run counts as the reference. None where none has finished on some task.

    Raises:
        InvalidArgumentError: for a task whose optimum is not known.
    """
    from agents.comparison.study import FAILURE_COUNTS_AS, matrix_of
    from agents.comparison.table import read_runs
    from lmgym.scores import sequential_test

    table = read_runs([cell.directory for cell in cells])
    matrix = matrix_of(table)
    known = () if matrix is None else matrix.tasks
    for run in table.finished:
        if run.task not in known:
            raise InvalidArgumentError(f"`tasks` must have a known optimum where seeds are added, got {run.task}.")
    if matrix is None or len(known) < len({cell.problem for cell in cells}):
        return None
    return sequential_test(matrix.with_failures_as(FAILURE_COUNTS_AS), plan)


def rule_of(found: SequentialResult, protocol: Protocol) -> Rule:
    """What was found, in words."""
    from agents.comparison.verdict import Rule

    plan = plan_of(protocol)
    evidence = (
        f"Seeds were added {plan.group} at a time, up to {protocol.max_seeds}, until each pair was decided by a "
        f"group-sequential permutation test: the probability that any of these verdicts is wrong is {plan.alpha:g}, "
        "and their intervals hold together at every look. Intervals and p-values below are of a fixed number of seeds."
    )
    return Rule(sentences_of(found, protocol.margin), evidence)


# -- words -----------------------------------------------------------------------------------------------------------


def standing(found: SequentialResult) -> str:
    """A line between two groups: which pairs are open, and who gets more seeds."""
    still = [f"{first} and {second}" for (first, second), x in found.verdicts.items() if x.verdict == "open"]
    more = ", ".join(f"{label} to {seeds}" for label, seeds in found.wanted.items())
    decided = len(found.verdicts) - len(still)
    return f"{decided} of {len(found.verdicts)} pairs are decided. Open: {'; '.join(still)}. Seeds go up: {more}."


def sentences_of(found: SequentialResult, margin: float | None) -> list[str]:
    """A sentence a pair, the decided ones first."""
    from agents.comparison.verdict import shown
    from lmgym.intervals import Interval

    def line(pair: tuple[str, str], verdict: Verdict) -> str:
        first, second = pair
        interval = verdict.gap
        if interval.mean < 0:
            first, second = second, first
            interval = Interval(-interval.mean, -interval.high, -interval.low)
        gap = shown(interval)
        if verdict.verdict in ("better", "worse"):
            return f"{first} is better than {second} by {gap} of the gain, after {verdict.seeds} seeds."
        if verdict.verdict == "same":
            return f"{first} and {second} are within {margin:g} of the gain, gap {gap}, after {verdict.seeds} seeds."
        more = "no number of seeds would tell" if math.isinf(verdict.more_seeds) else _told(verdict.more_seeds)
        return f"{first} and {second} are undecided after {verdict.seeds} seeds (gap {gap}; {more})."

    ordered = sorted(found.verdicts.items(), key=lambda item: item[1].verdict == "undecided")
    return [line(pair, verdict) for pair, verdict in ordered]


def _told(seeds: float) -> str:
    return f"about {seeds:.0f} more of a new comparison would tell"
