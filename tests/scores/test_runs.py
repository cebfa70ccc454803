"""What is said of single tasks and single runs, against scipy, published tables and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import shifted
from scipy import stats

from lmgym.errors import InvalidArgumentError
from lmgym.scores import (
    ScoreMatrix,
    WorstRun,
    failure_rates,
    share_interval,
    student_interval,
    task_intervals,
    tolerance_interval,
    worst_runs,
)


def test_task_intervals_are_those_of_student() -> None:
    scores = np.random.default_rng(0).normal(size=(1, 2, 5))
    matrix = ScoreMatrix.from_array(scores, axes=("labels", "tasks", "seeds"), labels=["a"], tasks=["t", "u"])
    found = task_intervals(matrix)["a"]["u"]
    expected = stats.t.interval(0.95, 4, scores[0, 1].mean(), stats.sem(scores[0, 1]))
    assert (found.low, found.high) == pytest.approx(expected)
    assert student_interval([0.3]).high == math.inf


@pytest.mark.parametrize(("runs", "share", "confidence"), [(46, 0.9, 0.95), (93, 0.95, 0.95), (38, 0.9, 0.9)])
def test_tolerance_by_order_needs_the_published_number_of_runs(runs: int, share: float, confidence: float) -> None:
    """Smallest samples whose two ends are a two-sided tolerance interval (Wilks 1941)."""
    scores = np.random.default_rng(0).normal(size=runs)
    found = tolerance_interval(scores, share, confidence)
    assert (found.low, found.high, found.method) == (scores.min(), scores.max(), "order")
    assert tolerance_interval(scores[1:], share, confidence).method == "normal"
    with pytest.raises(InvalidArgumentError, match=f"`scores` must be more runs .* got {runs - 1}"):
        tolerance_interval(scores[1:], share, confidence, method="order")


@pytest.mark.parametrize(("runs", "factor"), [(5, 4.275), (10, 2.839), (20, 2.310), (100, 1.874)])
def test_normal_tolerance_factors_are_the_published_ones(runs: int, factor: float) -> None:
    """Exact two-sided factors k for 90 % at confidence 95 % (Odeh & Owen 1980); Howe's are within 0.5 %."""
    scores = np.random.default_rng(0).normal(size=runs)
    found = tolerance_interval(scores, method="normal")
    assert (found.high - found.low) / 2 / scores.std(ddof=1) == pytest.approx(factor, rel=5e-3)


@pytest.mark.seeds
@pytest.mark.parametrize(("runs", "method"), [(5, "normal"), (60, "order"), (200, "order")])
def test_tolerance_intervals_hold_the_share_they_say(runs: int, method: str) -> None:
    rng = np.random.default_rng(shifted())
    held = 0
    for _ in range(400):
        found = tolerance_interval(rng.normal(size=runs), method=method)
        held += stats.norm.cdf(found.high) - stats.norm.cdf(found.low) >= 0.9
    assert held >= 0.92 * 400


def test_the_worst_run_is_named_and_a_failed_one_is_worst() -> None:
    matrix = ScoreMatrix.from_columns(
        label=["a"] * 5, task=["t", "t", "t", "u", "u"], seed=[3, 1, 2, 1, 2], score=[0.5, 0.2, 0.9, 0.4, math.nan]
    )
    found = worst_runs(matrix)["a"]
    assert found["t"] == WorstRun(1, 0.2)
    assert found["u"].seed == 2
    assert math.isnan(found["u"].score)


def test_failures_are_runs_that_broke_off_or_score_too_low() -> None:
    matrix = ScoreMatrix.from_columns(
        label=["a"] * 5, task=["t", "t", "t", "u", "u"], seed=[3, 1, 2, 1, 2], score=[0.5, -0.2, 0.9, 0.4, math.nan]
    )
    assert failure_rates(matrix)["a"] == share_interval(2, 5)
    assert failure_rates(matrix, below=0.45)["a"].mean == pytest.approx(3 / 5)


@pytest.mark.parametrize(("count", "total"), [(0, 5), (1, 5), (5, 5), (3, 40)])
def test_shares_have_the_interval_of_clopper_and_pearson(count: int, total: int) -> None:
    found = share_interval(count, total)
    expected = stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    assert (found.mean, found.low, found.high) == pytest.approx((count / total, expected.low, expected.high))
