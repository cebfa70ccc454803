"""Group-sequential permutation tests of two labels, after AdaStop (Mathieu et al. 2023, arXiv 2306.10882).

Seeds come in groups. After each group one may look, and stop. If both labels have the same distribution, then all ways
to deal the runs of a group to the two labels are equally likely, within every task. A way to deal all groups is a path:
the sum of the gaps of means it gives up to each look. The paths of R - 1 random ways and the true one are
exchangeable. At each look the test rejects the largest so many of them that the share it has rejected so far is at most
what it may spend. The true path is one of them, so that it is rejected at most as often.

Shapes: B tests, R paths (the first is the true one), M tasks, G seeds a group, K looks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-10  # numbers that differ by less, as a share of the largest, are ties


@dataclass(frozen=True, eq=False)
class Deals:
    """Ways to deal one group of runs to two labels, the true one first.

    Args:
        signs: (R, M, 2 G), 1 for a run that goes to the first label, else -1.
        shift: (R,) the gap of means that adding 1 to the first label's true runs makes.
    """

    signs: NDArray[np.float64]
    shift: NDArray[np.float64]


def draw_deals(paths: int, looks: int, tasks: int, group: int, rng: np.random.Generator) -> Iterator[Deals]:
    """For each of K groups the ways to deal it, one a path: the true way on the first path, and on the others random.

    As many groups from the first as have, together, no more ways than there are paths are dealt in all ways, each way
    on the same number of paths: at the first look of one task with 5 seeds there are 252. The number of paths is then
    the multiple of that below `paths`. The true path is one of its kind all the same.

    They come one by one, the same for as many as are asked for.
    """
    own = np.repeat([1.0, -1.0], group)
    ways = math.comb(2 * group, group) ** tasks
    counted = 0
    while counted < looks and ways ** (counted + 1) <= paths:
        counted += 1
    paths -= paths % ways**counted
    every = _all_ways(tasks, group) if counted else np.empty(0)
    for look in range(looks):
        if look < counted:
            signs = every[np.arange(paths) // ways**look % ways]
        else:
            signs = rng.permuted(np.broadcast_to(own, (paths, tasks, 2 * group)), axis=2)
            signs[0] = own
        yield Deals(signs, signs[:, :, :group].sum((1, 2)) / (tasks * group))


def _all_ways(tasks: int, group: int) -> NDArray[np.float64]:
    """Every way to deal a group, (ways, M, 2 G), the true one first."""
    one_task = -np.ones((math.comb(2 * group, group), 2 * group))
    for way, chosen in enumerate(itertools.combinations(range(2 * group), group)):
        one_task[way, list(chosen)] = 1
    return one_task[np.indices((len(one_task),) * tasks).reshape(tasks, -1).T]


def dealt_gaps(ours: NDArray[np.float64], theirs: NDArray[np.float64], deals: Deals) -> NDArray[np.float64]:
    """The gap of means that every way to deal a group gives: (B, M, G) each, returns (B, R)."""
    runs = np.concatenate([ours, theirs], axis=2)
    ways = deals.signs.reshape(len(deals.signs), -1)
    return runs.reshape(len(runs), -1) @ ways.T / ours[0].size


def boundaries(paths: NDArray[np.float64], level: float, looks: int) -> NDArray[np.float64]:
    """What the statistic must be above at each look of the test, for k looks that have been taken: (B, k).

    By look j it may have rejected a share level * j / K of the paths. What a look leaves unspent, the next may spend.

    Args:
        paths: (B, R, k), the statistic of every path at each look: large is evidence.
        level: how often the test may be wrong, over all its looks.
        looks: K, of which k may have been taken.
    """
    tests = np.arange(len(paths))
    total = paths.shape[1]
    bounds = np.empty((len(paths), paths.shape[2]))
    spent = np.zeros(len(paths), dtype=np.int64)
    left = np.ones(paths.shape[:2], dtype=bool)
    tie = _ROUNDING * np.abs(paths).max((1, 2), initial=0.0)
    for look in range(paths.shape[2]):
        allowed = np.floor(level * (look + 1) / looks * total + 1e-9).astype(np.int64) - spent
        statistic = np.where(left, paths[:, :, look], -np.inf)
        descending = -np.sort(-statistic, axis=1)
        bounds[:, look] = descending[tests, np.minimum(allowed, total - 1)] + tie
        rejected = statistic > bounds[:, look, None]
        spent += rejected.sum(1)
        left &= ~rejected
    return bounds


def first_crossing(paths: NDArray[np.float64], level: float, looks: int) -> NDArray[np.int64]:
    """The look, from 1, at which the true path is rejected; 0 where it is not. Arguments as in `boundaries`: (B,)."""
    crossed = paths[:, 0] > boundaries(paths, level, looks)
    return np.where(crossed.any(1), crossed.argmax(1) + 1, 0)
