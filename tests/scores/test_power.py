"""The power table: what it promises, fresh comparisons keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import shifted
from test_sequential import matrix_of, verdicts_of

from lmgym.errors import InvalidArgumentError
from lmgym.scores import SequentialPlan, power_table, sequential_test


@pytest.mark.seeds
@pytest.mark.parametrize(("gap", "tasks"), [(1.5, 1), (1.0, 3)])
def test_labels_are_told_apart_at_the_seeds_that_are_promised(gap: float, tasks: int) -> None:
    rng = np.random.default_rng(shifted())
    plan = SequentialPlan(deals=1_000)
    seeds = power_table([gap], plan, tasks=tasks, simulations=500, rng=rng).seeds_needed(0.8)[gap]
    assert seeds is not None
    told = 0
    for _ in range(150):
        scores = 0.1 * rng.normal(size=(2, tasks, seeds))
        scores[0] += 0.1 * gap
        told += verdicts_of(scores, plan).get(("a", "b")) == "better"
    assert told >= 150 * 0.8 - 3 * math.sqrt(150 * 0.8 * 0.2)


def test_power_grows_with_gap_and_seeds_and_shrinks_with_pairs() -> None:
    rng = np.random.default_rng(0)
    one = power_table([0.5, 1.0, 2.0], simulations=250, rng=rng)
    six = power_table([0.5, 1.0, 2.0], simulations=250, pairs=6, rng=rng)
    assert (np.diff(one.power, axis=1) >= 0).all()
    assert (np.diff(one.power[:, -1]) >= -0.05).all()
    assert (six.power[:, 2:].mean(1) < one.power[:, 2:].mean(1)).all()
    assert one.seeds_needed()[0.5] is None
    assert one.seeds.tolist() == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(("gap", "tasks"), [(0.75, 3), (0.5, 3), (0.75, 1)])
def test_the_seeds_that_are_said_to_be_missing_are_those_of_the_table(gap: float, tasks: int) -> None:
    """After 5 seeds that show the gap as it is, with the spread as it is, to within a group and a fifth."""
    plan = SequentialPlan(max_groups=12, deals=500)
    runs = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    scores = np.tile(runs / runs.std(ddof=1), (2, tasks, 1))
    scores[0] += gap
    found = sequential_test(matrix_of(scores), plan).verdicts["a", "b"]
    table = power_table([gap], plan, tasks=tasks, simulations=500, rng=np.random.default_rng(0))
    needed = table.seeds_needed()[gap]
    assert needed is not None
    assert abs(5 + found.more_seeds - needed) <= 5 + 0.2 * needed


def test_it_agrees_with_the_normal_approximation() -> None:
    """At 30 seeds of one look, power is about Phi(gap / sqrt(2 / n) - 1.96)."""
    plan = SequentialPlan(group=30, max_groups=1)
    found = power_table([0.75], plan, simulations=500, rng=np.random.default_rng(0))
    expected = 0.5 * math.erfc(-(0.75 / math.sqrt(2 / 30) - 1.96) / math.sqrt(2))
    assert found.power[0, 0] == pytest.approx(expected, abs=0.06)


def test_a_gap_of_nothing_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="`gaps` must be a finite number > 0"):
        power_table([0.0], rng=np.random.default_rng(0))
