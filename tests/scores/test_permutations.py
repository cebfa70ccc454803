"""Group-sequential permutation tests: boundaries against loops, and exactness by trying every way to deal."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from conftest import shifted

from lmgym.scores.permutations import boundaries, dealt_gaps, draw_deals, first_crossing


def paths_of(scores: np.ndarray, deals: int, rng: np.random.Generator) -> np.ndarray:
    """The two-sided statistic (B, R, K) of scores (2, B, K, M, G)."""
    drawn = list(draw_deals(deals, scores.shape[2], scores.shape[3], scores.shape[4], rng))
    gaps = [dealt_gaps(scores[0, :, k], scores[1, :, k], drawn[k]) for k in range(scores.shape[2])]
    return np.abs(np.cumsum(np.stack(gaps, axis=2), axis=2))


def walk_boundaries(paths: np.ndarray, level: float, looks: int) -> list[float]:
    """The definition of `boundaries` for one test of (R, k), path by path."""
    left = set(range(len(paths)))
    spent = 0
    bounds = []
    for look in range(paths.shape[1]):
        allowed = math.floor(level * (look + 1) / looks * len(paths) + 1e-9) - spent
        descending = sorted((paths[path][look] for path in left), reverse=True)
        bounds.append(descending[allowed])
        crossed = {path for path in left if paths[path][look] > bounds[-1] + 1e-9}
        assert len(crossed) <= allowed
        left -= crossed
        spent += len(crossed)
    return bounds


@pytest.mark.parametrize("ties", [False, True])
def test_boundaries_are_those_path_by_path(ties: bool) -> None:
    rng = np.random.default_rng(0)
    paths = np.abs(rng.normal(size=(5, 60, 4)).cumsum(2))
    if ties:
        paths = np.round(paths)
    found = boundaries(paths, 0.3, 5)
    assert found == pytest.approx(np.array([walk_boundaries(test, 0.3, 5) for test in paths]), abs=1e-8)


def test_a_deal_is_the_gap_of_the_means_it_makes() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 1, 3, 4))  # labels, tests, tasks, seeds
    (deals,) = draw_deals(30, 1, 3, 4, rng)
    found = dealt_gaps(scores[0], scores[1], deals)[0]
    moved = dealt_gaps(scores[0] + 0.7, scores[1], deals)[0]
    pooled = np.concatenate([scores[0, 0], scores[1, 0]], axis=1)
    for path in range(30):
        ours = deals.signs[path] > 0
        assert found[path] == pytest.approx(pooled[ours].mean() - pooled[~ours].mean())
        assert moved[path] - found[path] == pytest.approx(0.7 * deals.shift[path])
    assert found[0] == pytest.approx((scores[0] - scores[1]).mean())
    assert (deals.signs.sum(2) == 0).all()


def test_few_ways_are_all_tried() -> None:
    """20 ways to deal 3 + 3 runs: of 1,000 paths two groups are dealt in all 400 ways, twice, and a third at random."""
    deals = list(draw_deals(1_000, 3, 1, 3, np.random.default_rng(0)))
    ways = [{tuple(signs.ravel()) for signs in one.signs} for one in deals[:2]]
    both = [(*a.ravel(), *b.ravel()) for a, b in zip(deals[0].signs, deals[1].signs, strict=True)]
    assert [len(found) for found in ways] == [20, 20]
    assert (len(both), len(set(both))) == (800, 400)
    assert all(one.signs[0].ravel().tolist() == [1, 1, 1, -1, -1, -1] for one in deals)
    two_tasks = next(draw_deals(500, 1, 2, 3, np.random.default_rng(0))).signs
    assert len({tuple(signs.ravel()) for signs in two_tasks}) == len(two_tasks) == 400


@pytest.mark.parametrize("level", [0.05, 0.3, 0.5])
def test_of_all_ways_to_deal_no_more_than_the_level_are_rejected(level: float) -> None:
    """The definition of an exact test: every way to deal the runs is as likely as the true one."""
    scores = np.random.default_rng(0).normal(size=(2, 1, 2, 1, 3))
    paths = paths_of(scores, 400, np.random.default_rng(0))[0]
    turned = np.stack([np.roll(paths, -way, axis=0) for way in range(400)])
    share = (first_crossing(turned, level, 2) > 0).mean()
    assert level - 0.05 <= share <= level


@pytest.mark.seeds
@pytest.mark.parametrize(("tasks", "group"), [(1, 5), (3, 3)])
def test_the_false_alarm_rate_of_two_labels_is_at_most_5_percent(tasks: int, group: int) -> None:
    """1,000 comparisons of one skewed distribution with itself, stopped at any of 4 looks."""
    rng = np.random.default_rng(shifted())
    alarms = 0
    for _ in range(4):
        scores = rng.exponential(size=(2, 250, 4, tasks, group)) ** 2
        alarms += int((first_crossing(paths_of(scores, 300, rng), 0.05, 4) > 0).sum())
    assert alarms <= 1_000 * 0.05 + 3 * math.sqrt(1_000 * 0.05 * 0.95)


def test_a_test_at_every_look_at_the_full_level_is_wrong_far_more_often() -> None:
    """What the boundaries are for: 5 % at each of 4 looks is some 13 % in all."""
    paths = paths_of(np.random.default_rng(0).normal(size=(2, 250, 4, 2, 4)), 300, np.random.default_rng(0))
    alarms = np.zeros(250, dtype=bool)
    for look in range(4):
        alarms |= first_crossing(paths[:, :, look : look + 1], 0.05, 1) > 0
    assert alarms.mean() > 0.08


@pytest.mark.seeds
def test_the_false_alarm_rate_of_many_labels_is_at_most_5_percent() -> None:
    """An alarm for any of the 6 pairs of 4 labels: before the first, all are tested at a sixth of the level."""
    rng = np.random.default_rng(shifted())
    alarms = 0
    for _ in range(4):
        scores = rng.normal(size=(4, 250, 3, 2, 4))
        wrong = np.zeros(250, dtype=bool)
        for pair in itertools.combinations(range(4), 2):
            wrong |= first_crossing(paths_of(scores[list(pair)], 500, rng), 0.05 / 6, 3) > 0
        alarms += int(wrong.sum())
    assert alarms <= 1_000 * 0.05 + 3 * math.sqrt(1_000 * 0.05 * 0.95)
