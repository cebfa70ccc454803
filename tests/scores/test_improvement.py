"""The probability of improvement: the statistic against counting, its interval against simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import shifted

from lmgym.errors import InvalidArgumentError
from lmgym.scores import ScoreMatrix, probability_of_improvement
from lmgym.scores.improvement import METHODS, win_share


def pair_of(ours: np.ndarray, theirs: np.ndarray) -> ScoreMatrix:
    """Of (tasks, seeds) each."""
    tasks = [f"task-{i}" for i in range(len(ours))]
    return ScoreMatrix.from_array([ours, theirs], axes=("labels", "tasks", "seeds"), labels=("a", "b"), tasks=tasks)


def count_wins(ours: np.ndarray, theirs: np.ndarray) -> float:
    points = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(ours, theirs)]
    return sum(points) / len(points)


def test_the_share_is_counted_pair_by_pair_with_ties_half() -> None:
    rng = np.random.default_rng(0)
    ours = rng.integers(4, size=(10, 5)).astype(float)
    theirs = rng.integers(4, size=(10, 3)).astype(float)
    assert win_share(ours, theirs) == pytest.approx([count_wins(x, y) for x, y in zip(ours, theirs, strict=True)])


def test_it_is_averaged_over_tasks_and_turns_with_the_labels() -> None:
    rng = np.random.default_rng(0)
    ours = rng.normal(0.3, 1, (4, 5))
    theirs = rng.normal(0.0, 1, (4, 5))
    matrix = pair_of(ours, theirs)
    found = probability_of_improvement(matrix, "a", "b")
    turned = probability_of_improvement(matrix, "b", "a")
    assert found.mean == pytest.approx(np.mean([count_wins(x, y) for x, y in zip(ours, theirs, strict=True)]))
    assert (turned.low, turned.mean, turned.high) == pytest.approx((1 - found.high, 1 - found.mean, 1 - found.low))


def test_a_label_that_always_wins_is_not_certain_to() -> None:
    found = probability_of_improvement(pair_of(np.ones((1, 5)), np.zeros((1, 5))), "a", "b")
    assert (found.mean, found.high) == (1.0, 1.0)
    assert 0.5 < found.low < 0.9
    more = probability_of_improvement(pair_of(np.ones((6, 5)), np.zeros((6, 5))), "a", "b")
    assert found.low < more.low < 1


def test_the_variance_is_exact_where_both_are_alike() -> None:
    """Mann & Whitney's: (n + k + 1) / (12 n k)."""
    from lmgym.scores.improvement import _variance

    for ours, theirs in [(2, 2), (5, 5), (3, 7)]:
        assert _variance(0.5, [(ours, theirs)]) == pytest.approx((ours + theirs + 1) / (12 * ours * theirs))


def test_what_does_not_fit_is_an_error() -> None:
    matrix = pair_of(np.ones((1, 2)), np.ones((1, 2)))
    with pytest.raises(InvalidArgumentError, match="`rng` must be a generator"):
        probability_of_improvement(matrix, "a", "b", method="bootstrap")
    with pytest.raises(InvalidArgumentError, match="`over` must be another label"):
        probability_of_improvement(matrix, "a", "a")


@pytest.mark.seeds
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("tasks", [1, 3, 12])
def test_two_labels_of_one_algorithm_are_found_alike(tasks: int, seeds: int) -> None:
    """In at least 90 of 100 comparisons the interval holds 1/2. Its coverage is near 95 %; 400 make the test sure."""
    rng = np.random.default_rng(shifted())
    held = 0
    for _ in range(400):
        scores = rng.beta(0.5, 0.5, size=(2, tasks, seeds))
        found = probability_of_improvement(pair_of(*scores), "a", "b")
        held += found.low <= 0.5 <= found.high
    assert held >= 0.9 * 400


@pytest.mark.seeds
@pytest.mark.parametrize("method", METHODS)
def test_a_known_probability_is_held(method: str) -> None:
    """Normal scores one spread apart: the probability is Phi(1 / sqrt(2)) = 0.760."""
    rng = np.random.default_rng(shifted())
    held = 0
    for _ in range(200):
        matrix = pair_of(rng.normal(1, 1, (3, 10)), rng.normal(0, 1, (3, 10)))
        found = probability_of_improvement(matrix, "a", "b", method=method, rng=rng, resamples=500)
        held += found.low <= 0.760 <= found.high
    assert held >= 0.9 * 200
