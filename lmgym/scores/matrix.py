"""The scores of a comparison, one a run, under names: which label, which task, which seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmgym.errors import InvalidArgumentError, check_choice, check_number

AXES = ("labels", "tasks", "seeds")


@dataclass(frozen=True, eq=False)
class ScoreMatrix:
    """One score a run, of several labels (an agent and its settings) on several tasks with several seeds.

    A task may have fewer seeds than another. Every axis goes by its names, so that nothing depends on an order:
    `from_columns` takes a table, `from_array` an array whose axes are said.

    Args:
        labels, tasks, seeds: the names along the axes; each name once.
        scores: (labels, tasks, seeds); NaN where there is no score: no such run, or one that failed.
        failed: (labels, tasks, seeds), whether there was a run and it did not finish.
    """

    labels: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: NDArray[np.float64]
    failed: NDArray[np.bool_]

    def __post_init__(self) -> None:
        shape = tuple(len(getattr(self, axis)) for axis in AXES)
        for axis in AXES:
            names = getattr(self, axis)
            if len(set(names)) < len(names) or not names:
                raise InvalidArgumentError(f"`{axis}` must be names that differ, at least one, got {list(names)}.")
        for name in ("scores", "failed"):
            found = getattr(self, name).shape
            if found != shape:
                raise InvalidArgumentError(
                    f"`{name}` must have the shape (labels, tasks, seeds) = {shape}, got {found}."
                )
        if np.isinf(self.scores).any():
            raise InvalidArgumentError(
                "`scores` must be finite numbers, NaN where there is no score, got an infinite one."
            )
        if np.isfinite(self.scores[self.failed]).any():
            raise InvalidArgumentError("`failed` must be runs without a score, got one that has a score.")

    @classmethod
    def from_columns(
        cls, *, label: Iterable[str], task: Iterable[str], seed: Iterable[int], score: Iterable[float]
    ) -> ScoreMatrix:
        """From the columns of a table with one row a run. A run that did not finish has the score NaN.

        Raises:
            InvalidArgumentError: if the columns differ in length, or a run is there twice.
        """
        names = [[str(name) for name in column] for column in (label, task)]
        seeds = [int(number) for number in seed]
        values = np.asarray([float(number) for number in score])
        lengths = [len(names[0]), len(names[1]), len(seeds), len(values)]
        if len(set(lengths)) > 1:
            raise InvalidArgumentError(f"`label`, `task`, `seed`, `score` must have one length, got {lengths}.")
        labels = tuple(dict.fromkeys(names[0]))
        tasks = tuple(dict.fromkeys(names[1]))
        distinct = tuple(sorted(set(seeds)))
        scores = np.full((len(labels), len(tasks), len(distinct)), np.nan)
        runs = np.zeros(scores.shape, dtype=bool)
        for run in zip(names[0], names[1], seeds, values, strict=True):
            cell = (labels.index(run[0]), tasks.index(run[1]), distinct.index(run[2]))
            if runs[cell]:
                raise InvalidArgumentError(
                    f"`seed` must differ between the runs of a label on a task, got two of {run[:3]}."
                )
            scores[cell] = run[3]
            runs[cell] = True
        return cls(labels, tasks, distinct, scores, runs & np.isnan(scores))

    @classmethod
    def from_array(
        cls,
        scores: ArrayLike,
        *,
        axes: Sequence[str],
        labels: Sequence[str],
        tasks: Sequence[str],
        seeds: Sequence[int] | None = None,
    ) -> ScoreMatrix:
        """From an array of three axes in any order. NaN says that there is no such run.

        Args:
            scores: what `axes` says. axes: the names of its axes in their order, such as ("labels", "seeds", "tasks").
            labels, tasks, seeds: the names along these axes; seeds are numbered from 0 where they are not given.

        Raises:
            InvalidArgumentError: if `axes` are not these three, or an axis has another length than its names.
        """
        array = np.asarray(scores, dtype=np.float64)
        if sorted(axes) != sorted(AXES) or array.ndim != len(AXES):
            raise InvalidArgumentError(
                f"`axes` must be {AXES} in the order of the array's axes, got {tuple(axes)} for {array.ndim} axes."
            )
        array = np.moveaxis(array, [list(axes).index(axis) for axis in AXES], range(len(AXES)))
        numbered = tuple(range(array.shape[2])) if seeds is None else tuple(seeds)
        return cls(tuple(labels), tuple(tasks), numbered, array.copy(), np.zeros(array.shape, dtype=bool))

    def select(self, *, labels: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> ScoreMatrix:
        """The part with these labels and these tasks, in the order given; None takes all."""
        labels = self.labels if labels is None else labels
        tasks = self.tasks if tasks is None else tasks
        for label in labels:
            check_choice("labels", label, self.labels)
        for task in tasks:
            check_choice("tasks", task, self.tasks)
        part = np.ix_([self.labels.index(label) for label in labels], [self.tasks.index(task) for task in tasks])
        return ScoreMatrix(tuple(labels), tuple(tasks), self.seeds, self.scores[part], self.failed[part])

    def with_failures_as(self, score: float) -> ScoreMatrix:
        """Counts every failed run as if it had this score; 0 of a normalised score is the reference."""
        check_number("score", score, -np.inf)
        return replace(self, scores=np.where(self.failed, score, self.scores), failed=np.zeros_like(self.failed))

    def without_failures(self) -> ScoreMatrix:
        """Leaves failed runs out. Only the runs that finished then count, which flatters a label that fails."""
        return replace(self, failed=np.zeros_like(self.failed))

    def cell(self, label: str, task: str) -> dict[int, float]:
        """The scores of one label on one task by their seeds, failed runs as NaN."""
        check_choice("label", label, self.labels)
        check_choice("task", task, self.tasks)
        cell = (self.labels.index(label), self.tasks.index(task))
        runs = self.failed[cell] | np.isfinite(self.scores[cell])
        return {self.seeds[i]: float(self.scores[cell][i]) for i in np.flatnonzero(runs)}

    def strata(self, label: str) -> list[NDArray[np.float64]]:
        """The scores of a label, (n_m,) for the n_m runs on task m, in the order of `tasks`.

        Raises:
            InvalidArgumentError: if a task has no run, or a failed one: say what a failure counts as first.
        """
        strata = []
        for task in self.tasks:
            found = np.asarray(list(self.cell(label, task).values()))
            if not len(found):
                raise InvalidArgumentError(
                    f"`matrix` must have a run of every label on every task, got none of {label!r} on {task!r}. "
                    "Leave out the task or the label with `matrix.select(...)`."
                )
            if np.isnan(found).any():
                raise InvalidArgumentError(
                    f"`matrix` must have a score for every run, got {np.isnan(found).sum()} of {label!r} on {task!r} "
                    "that failed. Count failures as a score with `matrix.with_failures_as(0.0)`, or drop them with "
                    "`matrix.without_failures()`."
                )
            strata.append(found)
        return strata
