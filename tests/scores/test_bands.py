"""Profiles against counting, and their bands against single aggregates."""

from __future__ import annotations

import numpy as np
import pytest

from lmgym.scores import ScoreMatrix, aggregate, performance_profiles

SCORES = np.random.default_rng(0).normal(0.5, 0.3, (2, 4, 5))
MATRIX = ScoreMatrix.from_array(SCORES, axes=("labels", "tasks", "seeds"), labels=("a", "b"), tasks=tuple("tuvw"))


def test_a_profile_counts_runs_or_tasks_above_each_threshold() -> None:
    thresholds = [0.0, 0.3, float(SCORES[0, 0, 0]), 0.9]  # a score that equals the threshold is not above it
    runs = performance_profiles(MATRIX, thresholds, rng=np.random.default_rng(0))["a"]
    tasks = performance_profiles(MATRIX, thresholds, average_runs=True, rng=np.random.default_rng(0))["a"]
    assert runs.value.tolist() == pytest.approx([np.mean(SCORES[0].ravel() > t) for t in thresholds])
    assert tasks.value.tolist() == pytest.approx([np.mean(SCORES[0].mean(1) > t) for t in thresholds])


@pytest.mark.parametrize("average_runs", [False, True])
def test_its_band_is_the_bootstrap_of_each_point(average_runs: bool) -> None:
    """At one threshold it is the aggregate of a statistic that counts, drawn from the same generator."""

    def count(strata: list[np.ndarray]) -> np.ndarray:
        above = [(runs.mean(-1) > 0.4) if average_runs else (runs > 0.4).mean(-1) for runs in strata]
        return np.mean(above, axis=0)

    profile = performance_profiles(
        MATRIX, [0.4], average_runs=average_runs, rng=np.random.default_rng(1), resamples=500
    )["a"]
    single = aggregate(MATRIX, count, rng=np.random.default_rng(1), resamples=500)["a"]
    assert (profile.value[0], profile.low[0], profile.high[0]) == pytest.approx((single.mean, single.low, single.high))


def test_one_seed_gives_no_band() -> None:
    matrix = ScoreMatrix.from_array(SCORES[:, :, :1], axes=("labels", "tasks", "seeds"), labels="ab", tasks="tuvw")
    profile = performance_profiles(matrix, rng=np.random.default_rng(0))["a"]
    assert len(profile.at) == 101
    assert (profile.low == 0).all()
    assert (profile.high == 1).all()
