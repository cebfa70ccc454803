"""Aggregates against definitions written out, and their bootstrap against slow twins and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import shifted
from scipy import stats

from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.scores import STATISTICS, ScoreMatrix, aggregate, aggregate_gap, interquartile_mean
from lmgym.scores.bootstrap import resample, tail


def matrix_of(scores: np.ndarray, labels: tuple[str, ...] = ("a", "b")) -> ScoreMatrix:
    tasks = [f"task-{i}" for i in range(scores.shape[1])]
    return ScoreMatrix.from_array(scores, axes=("labels", "tasks", "seeds"), labels=labels, tasks=tasks)


def written_out(name: str, scores: np.ndarray) -> float:
    """The definitions of Agarwal et al. (2021), of (tasks, seeds)."""
    if name == "iqm":
        return float(stats.trim_mean(scores.ravel(), 0.25))
    means = [sum(runs) / len(runs) for runs in scores]
    if name == "mean":
        return sum(means) / len(means)
    if name == "median":
        return float(np.median(means))
    return float(np.mean([1 - min(score, 1.0) for runs in scores for score in runs]))


@pytest.mark.parametrize("name", sorted(STATISTICS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 3), (4, 6), (12, 5)])
def test_statistics_are_those_of_the_paper(name: str, shape: tuple[int, int]) -> None:
    scores = np.random.default_rng(0).normal(0.7, 0.4, shape)
    assert STATISTICS[name](list(scores)) == pytest.approx(written_out(name, scores))


def test_every_task_counts_the_same_whatever_its_number_of_runs() -> None:
    strata = [np.array([0.1, 0.4, 0.9]), np.array([0.2, 0.7])]
    repeated = [np.repeat(strata[0], 2), np.repeat(strata[1], 3)]  # 6 runs each, the same distributions
    for name in ("mean", "median", "optimality_gap"):
        assert STATISTICS[name](strata) == pytest.approx(STATISTICS[name](repeated))
    # A quarter of the weight of 2 is 1/2: the lowest run weighs 1/3 and leaves; 1/3 + 1/2 would be too much. So above.
    assert interquartile_mean(strata) == pytest.approx((0.2 / 2 + 0.4 / 3 + 0.7 / 2) / (1 / 2 + 1 / 3 + 1 / 2))


def test_resamples_in_a_batch_are_those_one_by_one() -> None:
    strata = list(np.random.default_rng(0).normal(size=(3, 5)))
    drawn = resample(strata, 20, np.random.default_rng(1))
    for name, statistic in STATISTICS.items():
        single = [written_out(name, np.stack([runs[i] for runs in drawn])) for i in range(20)]
        assert statistic(drawn) == pytest.approx(single)
    assert all(np.isin(drawn[m], strata[m]).all() for m in range(3))  # no run leaves its task


def test_the_bootstrap_of_a_mean_has_its_closed_form() -> None:
    """The variance of a resampled mean is that of the runs, divided by n and not n - 1, and the mean of the tasks'."""
    scores = np.random.default_rng(shifted()).normal(size=(1, 4, 30))
    found = aggregate(matrix_of(scores, ("a",)), "mean", rng=np.random.default_rng(0), expanded=False)["a"]
    spread = math.sqrt((scores[0].var(1) / 30).sum()) / 4
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert found.mean == pytest.approx(scores.mean())


def test_the_tails_are_those_of_student() -> None:
    runs = np.random.default_rng(0).normal(size=5)
    assert tail([runs, runs], expanded=False) == pytest.approx(0.025)
    assert tail([runs, runs]) == pytest.approx(stats.norm.cdf(-stats.t.ppf(0.975, 8) * math.sqrt(5 / 4)))
    assert tail([runs, 1e-3 * runs]) == pytest.approx(
        stats.norm.cdf(-stats.t.ppf(0.975, 4) * math.sqrt(5 / 4)), rel=1e-4
    )
    assert tail([np.arange(10**5)]) == pytest.approx(0.025, rel=1e-3)
    assert tail([np.ones(5)]) == pytest.approx(0.025)


def test_the_freedom_is_that_of_welch() -> None:
    """Two labels on one task: the tail is that of Welch's t-test."""
    rng = np.random.default_rng(0)
    ours = rng.normal(size=6)
    theirs = 3 * rng.normal(size=6)
    freedom = stats.ttest_ind(ours, theirs, equal_var=False).df
    assert tail([ours, theirs]) == pytest.approx(stats.norm.cdf(-stats.t.ppf(0.975, freedom) * math.sqrt(6 / 5)))


def test_the_same_generator_gives_the_same_intervals() -> None:
    matrix = matrix_of(np.random.default_rng(0).normal(size=(2, 3, 5)))
    found = [aggregate(matrix, rng=np.random.default_rng(seed), resamples=200) for seed in (3, 3, 4)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_one_seed_says_nothing_of_other_seeds() -> None:
    found = aggregate(matrix_of(np.ones((1, 2, 1)), ("a",)), rng=np.random.default_rng(0), resamples=10)["a"]
    assert (found.mean, found.low, found.high) == (1.0, -math.inf, math.inf)


def test_a_gap_is_that_of_the_aggregates() -> None:
    scores = np.random.default_rng(shifted()).normal(size=(2, 3, 20))
    matrix = matrix_of(scores)
    rng = np.random.default_rng(0)
    found = aggregate_gap(matrix, "b", "a", "mean", rng=rng)
    assert found.mean == pytest.approx(scores[1].mean() - scores[0].mean())
    single = aggregate(matrix, "mean", rng=rng)
    widths = {label: interval.high - interval.low for label, interval in single.items()}
    assert found.high - found.low == pytest.approx(math.hypot(*widths.values()), rel=0.06)


def test_unknown_names_are_errors() -> None:
    matrix = matrix_of(np.zeros((2, 1, 2)))
    rng = np.random.default_rng(0)
    with pytest.raises(UnknownNameError, match="Did you mean 'iqm'"):
        aggregate(matrix, "iqmm", rng=rng)
    with pytest.raises(InvalidArgumentError, match="`over` must be another label"):
        aggregate_gap(matrix, "a", "a", rng=rng)


@pytest.mark.seeds
def test_intervals_of_few_seeds_hold_the_truth() -> None:
    """5 seeds on 3 tasks, one of which decides: the widened interval holds it in 93 of 100 cases, the plain in 85."""
    rng = np.random.default_rng(shifted())
    centre = np.array([0.4, 0.6, 0.9])[:, None]
    spread = np.array([0.01, 0.3, 0.02])[:, None]
    held = {True: 0, False: 0}
    for _ in range(400):
        matrix = matrix_of((centre + spread * rng.standard_normal((3, 5)))[None], ("a",))
        for expanded in held:
            found = aggregate(matrix, "mean", rng=rng, resamples=1_000, expanded=expanded)["a"]
            held[expanded] += found.low <= centre.mean() <= found.high
    assert held[True] >= 0.89 * 400
    assert held[False] <= held[True] - 10
