"""Krippendorff's alpha against published worked examples, and agreement on pairs of a ranking."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.feedback.agreement import compare_pairs, count_agreeing_pairs, krippendorff_alpha, ranking_alpha


def columns(*rows: str) -> list[list[float]]:
    """Units of a table with a row an annotator; "." is missing."""
    return [[float(value) for value in unit if value != "."] for unit in zip(*map(str.split, rows), strict=True)]


# Krippendorff (2011), sections A, B and C (letters as numbers), and the example of the article in Wikipedia.
BINARY = columns("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0")
NOMINAL = columns("1 1 2 2 4 3 3 3 5 4 4 1", "2 1 2 2 2 3 3 3 5 4 4 4")
FOUR = columns(
    "1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."
)
THREE = columns(". . . . . 3 4 1 2 1 1 3 3 . 3", "1 . 2 1 3 3 4 3 . . . . . . .", ". . 2 1 3 4 4 . 2 1 1 3 3 . 4")


@pytest.mark.parametrize(
    ("units", "metric", "published"),
    [
        (BINARY, "nominal", 0.095),
        (NOMINAL, "nominal", 0.692),
        (FOUR, "nominal", 0.743),
        (FOUR, "ordinal", 0.815),
        (FOUR, "interval", 0.849),
        (FOUR, "ratio", 0.797),
        (THREE, "nominal", 0.691),
        (THREE, "interval", 0.811),
    ],
)
def test_alpha_is_that_of_published_examples(units: list[list[float]], metric: str, published: float) -> None:
    assert krippendorff_alpha(units, metric) == pytest.approx(published, abs=6e-4)


def slow_alpha(units: list[list[float]]) -> float:
    """The definition, pair by pair, under the metric "interval"."""
    units = [unit for unit in units if len(unit) > 1]
    everything = [value for unit in units for value in unit]
    observed = sum(
        sum((a - b) ** 2 for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(everything)
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(everything, 2))
    return 1 - observed / (expected / (len(everything) * (len(everything) - 1)))


def test_alpha_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(3)
    units = [list(rng.integers(0, 7, size).astype(float)) for size in rng.integers(0, 6, 40)]
    assert krippendorff_alpha(units, "interval") == pytest.approx(slow_alpha(units), abs=1e-12)


def test_alpha_of_no_variation_is_not_a_number() -> None:
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert math.isnan(krippendorff_alpha([[1], []]))
    assert math.isnan(krippendorff_alpha([]))
    assert krippendorff_alpha([[1, 1], [2, 2]]) == 1


def test_alpha_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(InvalidArgumentError, match="finite"):
        krippendorff_alpha([[1, math.nan]])
    with pytest.raises(InvalidArgumentError, match=">= 0"):
        krippendorff_alpha([[-1, 1]], "ratio")
    with pytest.raises(UnknownNameError, match="nominal"):
        krippendorff_alpha([[1, 1]], "cosine")  # type: ignore[arg-type]


def test_pairs_of_a_ranking() -> None:
    assert compare_pairs([1, 2, 2]) == {(0, 1): 1, (0, 2): 1, (1, 2): 0}
    assert compare_pairs([2, None, 1]) == {(0, 2): -1}
    assert count_agreeing_pairs([1, 2, 3], [1, 3, 2]) == (2, 3)
    assert count_agreeing_pairs([1, 2, None], [1, 1, 2]) == (0, 1)
    assert count_agreeing_pairs([1, None], [1, 2]) == (0, 0)


def test_alpha_of_rankings_does_not_depend_on_the_order_of_the_responses() -> None:
    """Everybody who prefers the first response agrees by more than chance only if the order means nothing."""
    rng = np.random.default_rng(0)
    items = [[list(1 + rng.permutation(3)) for _ in range(2)] for _ in range(30)]
    turned = [[list(reversed(ranks)) for ranks in rankings] for rankings in items]
    assert ranking_alpha(items) == pytest.approx(ranking_alpha(turned), abs=1e-12)
    assert abs(ranking_alpha(items)) < 0.3  # two people who guess
    assert ranking_alpha([[ranks, ranks] for ranks, _ in items]) == 1
    assert ranking_alpha([[[1, 2], [1, 2]]] * 5) == 1  # one-sided, where alpha of one direction has no value
    assert ranking_alpha([[[1, 2], [2, 1]]] * 50) < -0.9
