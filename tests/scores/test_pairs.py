"""Tests of pairs: the permutation test against enumeration, Holm's correction against its rule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from conftest import shifted

from lmgym.errors import InvalidArgumentError
from lmgym.scores import ScoreMatrix, aggregate_gap, compare_pairs, holm, permutation_p_value


def matrix_of(scores: np.ndarray) -> ScoreMatrix:
    """Of (labels, tasks, seeds)."""
    labels = tuple("abcdef"[: len(scores)])
    tasks = tuple(f"task-{i}" for i in range(scores.shape[1]))
    return ScoreMatrix.from_array(scores, axes=("labels", "tasks", "seeds"), labels=labels, tasks=tasks)


def test_the_permutation_test_is_that_of_all_deals() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 2, 3))
    scores[0] += 0.5
    deals = []
    for task in range(2):
        runs = scores[:, task].ravel()
        deals.append([2 * runs[list(ours)].mean() for ours in itertools.combinations(range(6), 3)] - 2 * runs.mean())
    all_gaps = np.add.outer(deals[0], deals[1])
    expected = np.mean(np.abs(all_gaps) >= abs((scores[0] - scores[1]).mean(1).sum()) - 1e-9)
    found = permutation_p_value(matrix_of(scores), "a", "b", rng=np.random.default_rng(0), permutations=20_000)
    assert found == pytest.approx(expected, abs=0.015)


def test_equal_scores_do_not_differ() -> None:
    assert permutation_p_value(matrix_of(np.full((2, 3, 4), 0.1)), "a", "b", rng=np.random.default_rng(0)) == 1


@pytest.mark.seeds
def test_it_is_wrong_in_one_case_of_twenty() -> None:
    """Skewed scores of 4 seeds on 3 tasks, of one distribution."""
    rng = np.random.default_rng(shifted())
    p_values = [
        permutation_p_value(matrix_of(rng.exponential(size=(2, 3, 4))), "a", "b", rng=rng, permutations=199)
        for _ in range(1_000)
    ]
    assert np.mean(np.asarray(p_values) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1_000)


def test_holm_multiplies_by_how_many_are_left() -> None:
    found = holm({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.5})
    assert found == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.5})
    assert list(found) == ["a", "b", "c", "d"]
    with pytest.raises(InvalidArgumentError, match=r"`p_values\['a'\]` must be a finite number >= 0 and <= 1"):
        holm({"a": 1.1})


def test_holm_rejects_what_its_rule_rejects() -> None:
    """Step down: the j-th smallest is rejected while it is at most 0.05 / (m - j)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = dict(enumerate(rng.beta(0.3, 3, size=6)))
        rejected = set()
        for name in sorted(p_values, key=p_values.__getitem__):
            if p_values[name] > 0.05 / (len(p_values) - len(rejected)):
                break
            rejected.add(name)
        assert {name for name, p in holm(p_values).items() if p <= 0.05} == rejected


def test_pairs_are_compared_with_all_their_numbers() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 2, 5))
    scores[2] += 5
    found = compare_pairs(matrix_of(scores), rng=np.random.default_rng(0), resamples=500)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "c"].gap.high < 0
    assert found["a", "c"].improvement.mean == 0
    assert found["a", "c"].adjusted <= 0.05 < found["a", "b"].adjusted
    gap = aggregate_gap(matrix_of(scores), "a", "b", rng=np.random.default_rng(0), resamples=500)
    assert found["a", "b"].gap == gap
