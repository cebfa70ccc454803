"""How far annotators agree: Krippendorff's alpha, and the pairs of responses that two people order alike.

Legend: U units (what is judged), V distinct values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import InvalidArgumentError, check_choice

Metric = Literal["nominal", "ordinal", "interval", "ratio"]
METRICS = ("nominal", "ordinal", "interval", "ratio")


def krippendorff_alpha(units: Iterable[Sequence[float]], metric: Metric = "nominal") -> float:
    """Krippendorff's alpha, the agreement of any number of annotators beyond chance.

    alpha = 1 - D_o / D_e: the mean difference between the values that a unit was given, over that between values drawn
    from all units. 1 is full agreement, 0 is what chance gives, and less is systematic disagreement (Krippendorff 2011,
    "Computing Krippendorff's Alpha-Reliability"). Missing values need no care: a unit counts if it has two values.

    Args:
        units: For each unit the values that annotators gave it, in any order, as many as there are.
        metric: How far two values are apart: "nominal" (the same or not), "ordinal" (by the number of values between
            them), "interval" (their difference) or "ratio" (their difference over their sum).

    Returns:
        alpha, or NaN where nothing tells chance from agreement: no unit with two values, or all values the same.

    Raises:
        InvalidArgumentError: for a value that is no finite number, and under "ratio" for a negative one.
    """
    check_choice("metric", metric, METRICS)
    values, coincidences = _count_coincidences([list(unit) for unit in units if len(unit) >= 2])
    if metric == "ratio" and (values < 0).any():
        raise InvalidArgumentError(f"`units` must hold numbers >= 0 for the metric 'ratio', got {values.min():g}.")
    totals = coincidences.sum(axis=0)
    count = totals.sum()
    distances = _square_distances(values, totals, metric)
    expected = (np.outer(totals, totals) * distances).sum()
    if expected == 0:
        return float("nan")
    return float(1 - (count - 1) * (coincidences * distances).sum() / expected)


def _count_coincidences(units: list[list[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(V,) values in order, and (V, V) how often two values meet in a unit, each unit weighing its number of values."""
    sizes = np.array([len(unit) for unit in units], dtype=np.int64)
    flat = np.array([value for unit in units for value in unit], dtype=np.float64)
    if not np.isfinite(flat).all():
        raise InvalidArgumentError("`units` must hold finite numbers, got some that are not.")
    values, codes = np.unique(flat, return_inverse=True)
    counts = np.zeros((len(units), len(values)))  # (U, V)
    np.add.at(counts, (np.repeat(np.arange(len(units)), sizes), codes), 1)
    weights = 1 / (sizes - 1)
    coincidences = (counts * weights[:, None]).T @ counts
    return values, coincidences - np.diag(weights @ counts)


def _square_distances(values: NDArray[np.float64], totals: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    """(V, V) squared distances of two values under a metric."""
    if metric == "nominal":
        return (values[:, None] != values).astype(np.float64)
    if metric == "ordinal":
        middles = np.cumsum(totals) - totals / 2
        return (middles[:, None] - middles) ** 2
    difference = values[:, None] - values
    if metric == "interval":
        return difference**2
    sums = values[:, None] + values
    return (difference / np.where(sums == 0, 1, sums)) ** 2


def compare_pairs(ranks: Sequence[int | None]) -> dict[tuple[int, int], int]:
    """The pairs of responses that a ranking with ties orders: (i, j), i < j, to 1 (i is better), 0 (tie) or -1.

    Args:
        ranks: (K,) ranks, 1 the best, equal ones a tie; None for a response that was not ranked.
    """
    pairs = {}
    for i, first in enumerate(ranks):
        for j in range(i + 1, len(ranks)):
            second = ranks[j]
            if first is not None and second is not None:
                pairs[i, j] = int(first < second) - int(first > second)
    return pairs


def ranking_alpha(items: Iterable[Sequence[Sequence[int | None]]]) -> float:
    """Krippendorff's alpha of rankings, of which each pair of responses is a unit.

    A pair counts in both directions, so that alpha does not depend on the order in which the responses are stored. A
    tie is halfway between the two orders (the metric "interval").

    Args:
        items: For each item the (K,) ranks that annotators gave its responses, as `compare_pairs` takes them.
    """
    units: list[list[float]] = []
    for rankings in items:
        compared: dict[tuple[int, int], list[float]] = {}
        for ranks in rankings:
            for pair, sign in compare_pairs(ranks).items():
                compared.setdefault(pair, []).append(sign)
        units += compared.values()
        units += [[-sign for sign in signs] for signs in compared.values()]
    return krippendorff_alpha(units, "interval")


def count_agreeing_pairs(first: Sequence[int | None], second: Sequence[int | None]) -> tuple[int, int]:
    """How many pairs of responses two rankings order alike (a tie is an order too), and how many both of them order."""
    other = compare_pairs(second)
    shared = [(sign, other[pair]) for pair, sign in compare_pairs(first).items() if pair in other]
    return sum(mine == theirs for mine, theirs in shared), len(shared)
