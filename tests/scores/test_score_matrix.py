"""Scores under names: nothing depends on an order, and a table or an array that does not fit is an error."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from sources import ROOT

from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.scores import ScoreMatrix

LABELS = ("ppo", "rloo")
TASKS = ("echo", "rare", "stop")


def array_of(axes: tuple[str, ...]) -> np.ndarray:
    """Scores 100 label + 10 task + seed, with the axes in the order given."""
    found = sum(f * np.arange(n).reshape(s) for f, n, s in [(100, 2, (2, 1, 1)), (10, 3, (1, 3, 1)), (1, 2, (1, 1, 2))])
    return np.transpose(found, [("labels", "tasks", "seeds").index(axis) for axis in axes])


@pytest.mark.parametrize(
    "axes", [("labels", "tasks", "seeds"), ("labels", "seeds", "tasks"), ("seeds", "tasks", "labels")]
)
def test_axes_go_by_their_names(axes: tuple[str, ...]) -> None:
    matrix = ScoreMatrix.from_array(array_of(axes), axes=axes, labels=LABELS, tasks=TASKS)
    assert matrix.cell("rloo", "stop") == {0: 120.0, 1: 121.0}
    assert [runs.tolist() for runs in matrix.strata("ppo")] == [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]


def test_runs_and_tasks_that_are_swapped_are_an_error() -> None:
    swapped = array_of(("labels", "seeds", "tasks"))
    with pytest.raises(InvalidArgumentError, match=r"`scores` must have the shape .* = \(2, 3, 3\), got \(2, 2, 3\)."):
        ScoreMatrix.from_array(swapped, axes=("labels", "tasks", "seeds"), labels=LABELS, tasks=TASKS, seeds=(0, 1, 2))
    with pytest.raises(InvalidArgumentError, match="`axes` must be"):
        ScoreMatrix.from_array(swapped, axes=("labels", "runs", "tasks"), labels=LABELS, tasks=TASKS)


def test_a_table_gives_the_same_matrix_in_any_order_of_its_rows() -> None:
    rows = [(label, task, seed) for label in LABELS for task in TASKS for seed in (3, 5)]
    scores = {row: float(i) for i, row in enumerate(rows)}
    rng = np.random.default_rng(0)
    for _ in range(3):
        shuffled = [rows[i] for i in rng.permutation(len(rows))]
        matrix = ScoreMatrix.from_columns(
            label=[row[0] for row in shuffled],
            task=[row[1] for row in shuffled],
            seed=[row[2] for row in shuffled],
            score=[scores[row] for row in shuffled],
        )
        assert all(matrix.cell(row[0], row[1])[row[2]] == scores[row] for row in rows)


def test_a_table_with_a_run_twice_or_short_columns_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="got two of"):
        ScoreMatrix.from_columns(label=["a", "a"], task=["t", "t"], seed=[0, 0], score=[1, 2])
    with pytest.raises(InvalidArgumentError, match="must have one length"):
        ScoreMatrix.from_columns(label=["a", "a"], task=["t", "t"], seed=[0, 1], score=[1])


def test_tasks_may_have_unequal_numbers_of_seeds() -> None:
    matrix = ScoreMatrix.from_columns(label=["a"] * 3, task=["t", "t", "u"], seed=[0, 1, 1], score=[1, 2, 3])
    assert [len(runs) for runs in matrix.strata("a")] == [2, 1]


def test_failures_are_not_overlooked() -> None:
    matrix = ScoreMatrix.from_columns(label=["a", "a"], task=["t", "t"], seed=[0, 1], score=[math.nan, 0.5])
    with pytest.raises(InvalidArgumentError, match="got 1 of 'a' on 't' that failed"):
        matrix.strata("a")
    assert matrix.with_failures_as(0.0).strata("a")[0].tolist() == [0.0, 0.5]
    assert matrix.without_failures().strata("a")[0].tolist() == [0.5]


def test_a_task_without_runs_is_an_error_until_it_is_left_out() -> None:
    matrix = ScoreMatrix.from_columns(label=["a", "a", "b"], task=["t", "u", "t"], seed=[0, 0, 0], score=[1, 2, 3])
    with pytest.raises(InvalidArgumentError, match="got none of 'b' on 'u'"):
        matrix.strata("b")
    assert matrix.select(tasks=["t"]).strata("b")[0].tolist() == [3.0]
    with pytest.raises(UnknownNameError, match="Did you mean 'u'"):
        matrix.select(tasks=["uu"])


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_scores_are_an_error(bad: float) -> None:
    with pytest.raises(InvalidArgumentError, match="`scores` must be finite"):
        ScoreMatrix.from_columns(label=["a"], task=["t"], seed=[0], score=[bad])


def test_importing_the_statistics_loads_no_torch() -> None:
    code = "import sys, lmgym.scores; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
