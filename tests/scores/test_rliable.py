"""The same numbers as `rliable`, where it is installed: it brings arch, statsmodels, pandas and seaborn.

`pip install rliable "pandas<3"`, which arch 7.2 needs, then `pytest tests/scores/test_rliable.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from lmgym.scores import STATISTICS, ScoreMatrix, aggregate, performance_profiles, probability_of_improvement

library = pytest.importorskip("rliable.library", reason="rliable is not installed")
metrics = pytest.importorskip("rliable.metrics", reason="rliable is not installed")

THEIRS = {
    "iqm": "aggregate_iqm",
    "mean": "aggregate_mean",
    "median": "aggregate_median",
    "optimality_gap": "aggregate_optimality_gap",
}
SCORES = np.random.default_rng(0).normal(0.7, 0.3, (2, 5, 7))  # labels, tasks, seeds
MATRIX = ScoreMatrix.from_array(SCORES, axes=("labels", "tasks", "seeds"), labels=("a", "b"), tasks=tuple("tuvwx"))


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_aggregates_and_intervals_are_the_same(name: str) -> None:
    function = getattr(metrics, THEIRS[name])
    points, ends = library.get_interval_estimates(
        {"a": SCORES[0].T}, lambda scores: np.array([function(scores)]), reps=4_000
    )
    found = aggregate(MATRIX, name, rng=np.random.default_rng(0), expanded=False)["a"]
    width = found.high - found.low
    assert found.mean == pytest.approx(float(points["a"][0]))
    assert (found.low, found.high) == pytest.approx(tuple(ends["a"][:, 0]), abs=0.06 * width)


def test_the_probability_of_improvement_is_the_same() -> None:
    pairs = {"a": (SCORES[0].T, SCORES[1].T)}
    points, ends = library.get_interval_estimates(
        pairs, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=1_000
    )
    found = probability_of_improvement(MATRIX, "a", "b", method="bootstrap", rng=np.random.default_rng(0))
    assert found.mean == pytest.approx(float(points["a"][0]))
    assert (found.low, found.high) == pytest.approx(tuple(ends["a"][:, 0]), abs=0.03)


@pytest.mark.parametrize("average_runs", [False, True])
def test_performance_profiles_are_the_same(average_runs: bool) -> None:
    thresholds = np.linspace(0, 1.2, 7)
    points, ends = library.create_performance_profile(
        {"a": SCORES[0].T}, thresholds, use_score_distribution=not average_runs, reps=2_000
    )
    found = performance_profiles(
        MATRIX, thresholds, average_runs=average_runs, rng=np.random.default_rng(0), expanded=False
    )["a"]
    assert found.value == pytest.approx(points["a"])
    assert np.stack([found.low, found.high]) == pytest.approx(ends["a"], abs=0.03 if not average_runs else 0.2)
