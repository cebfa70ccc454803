"""All pairs of labels at once: by how much, how likely, and how sure, corrected for how many pairs there are."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lmgym.errors import InvalidArgumentError, check_int, check_number
from lmgym.intervals import Interval
from lmgym.scores.aggregates import Statistic, aggregate_gap
from lmgym.scores.bootstrap import RESAMPLES
from lmgym.scores.improvement import probability_of_improvement
from lmgym.scores.matrix import ScoreMatrix

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class PairComparison:
    """The first label of a pair beside the second.

    Args:
        gap: by how much its aggregate is above the other's.
        improvement: the probability that a run of it is better than a run of the other.
        p_value: of the permutation test of the mean gap.
        adjusted: the same after Holm's correction for all pairs. At most 0.05 says that they differ.
    """

    gap: Interval
    improvement: Interval
    p_value: float
    adjusted: float


def compare_pairs(
    matrix: ScoreMatrix, statistic: str | Statistic = "iqm", *, rng: np.random.Generator, resamples: int = RESAMPLES
) -> dict[tuple[str, str], PairComparison]:
    """Compares every label with every later one.

    The number of runs must be set before the first is seen. Who looks and then adds runs needs a sequential test.
    """
    pairs = list(itertools.combinations(matrix.labels, 2))
    gaps = {pair: aggregate_gap(matrix, *pair, statistic, rng=rng, resamples=resamples) for pair in pairs}
    p_values = {pair: permutation_p_value(matrix, *pair, rng=rng, permutations=resamples) for pair in pairs}
    adjusted = holm(p_values)
    return {
        pair: PairComparison(gaps[pair], probability_of_improvement(matrix, *pair), p_values[pair], adjusted[pair])
        for pair in pairs
    }


def permutation_p_value(
    matrix: ScoreMatrix, label: str, over: str, *, rng: np.random.Generator, permutations: int = RESAMPLES
) -> float:
    """How often a gap of means at least as large, in either direction, comes out where the runs are dealt at random.

    Runs are dealt anew to the two labels within each task. Where both have the same distribution on every task, the
    p-value is at most p with probability p, exactly, whatever the distribution and the number of runs.

    Args:
        matrix: the scores. label, over: the two labels.
        rng: deals. permutations: how often; the p-value is at least 1 / (permutations + 1).
    """
    check_int("permutations", permutations, 1)
    gap = 0.0
    dealt = np.zeros(permutations)
    size = 0.0
    for ours, theirs in zip(matrix.strata(label), matrix.strata(over), strict=True):
        runs = np.concatenate([ours, theirs])
        shuffled = rng.permuted(np.broadcast_to(runs, (permutations, len(runs))), axis=1)
        gap += ours.mean() - theirs.mean()
        dealt += shuffled[:, : len(ours)].mean(1) - shuffled[:, len(ours) :].mean(1)
        size += np.abs(runs).max()
    as_large = int((np.abs(dealt) >= abs(gap) - 1e-12 * size).sum())
    return (1 + as_large) / (1 + permutations)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's (1979) adjusted p-values: those at most 0.05 hold together, with a chance of 0.05 that any is wrong.

    The smallest of m is taken times m, the next times m - 1, and so on, and none is below the one before it. Nothing is
    assumed of how the tests depend on one another.
    """
    for name, p in p_values.items():
        check_number(f"p_values[{name!r}]", p, 0, 1)
    if not p_values:
        raise InvalidArgumentError("`p_values` must have at least one, got none.")
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
