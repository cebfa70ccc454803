"""The normalised return: 0 for the reference, 1 for the optimum, and what the errors of its parts make of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import shifted

from lmgym.errors import InvalidArgumentError
from lmgym.intervals import Interval
from lmgym.scores import normalised, reference_return
from lmgym.tasks import StoredOptimum


def test_normalised_is_the_share_of_the_gain() -> None:
    found = normalised(Interval(0.8, 0.7, 0.9), Interval(0.2, 0.1, 0.3), 1.4)
    half = math.hypot(0.1, 0.5 * 0.1) / 1.2
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_the_reference_is_0_the_optimum_1_and_worse_than_the_reference_below_0() -> None:
    assert normalised(Interval(0.2, 0.2, 0.2), 0.2, 1.2) == Interval(0.0, 0.0, 0.0)
    assert normalised(Interval(1.2, 1.2, 1.2), 0.2, 1.2) == Interval(1.0, 1.0, 1.0)
    assert normalised(Interval(0.0, -0.1, 0.1), 0.2, 1.2).mean == pytest.approx(-0.2)


def test_the_error_is_that_of_sampling_both() -> None:
    """The first-order interval against the spread of the ratio itself."""
    rng = np.random.default_rng(0)
    value = 0.9 + 0.02 * rng.standard_normal(100_000)
    reference = 0.1 + 0.03 * rng.standard_normal(100_000)
    spread = 1.96 * ((value - reference) / (1.3 - reference)).std()
    a = 1.96 * 0.02
    b = 1.96 * 0.03
    found = normalised(Interval(0.9, 0.9 - a, 0.9 + a), Interval(0.1, 0.1 - b, 0.1 + b), 1.3)
    assert found.high - found.mean == pytest.approx(spread, rel=0.02)


@pytest.mark.seeds
@pytest.mark.parametrize(("best", "known"), [(1.3, None), (1.2, (1.2, 1.5)), (1.5, (1.2, 1.5)), (1.3, (1.2, None))])
@pytest.mark.parametrize("prompts", [8, 100])
def test_the_interval_holds_the_true_share(prompts: int, best: float, known: tuple | None) -> None:
    """1,000 evaluations of J and of J_ref, skewed returns, V* exact, or within bounds wherever it is between them.

    Of an optimum that is known from below only, the share is at most what is said: the upper end is what holds.
    """
    rng = np.random.default_rng(shifted())
    truth = (0.9 - 0.1) / (best - 0.1)
    optimum = best if known is None else StoredOptimum("bounds", known[0], known[0], known[1], 0.1)
    noise = rng.gamma(4, 0.5, size=(2, 1_000, prompts)) - 2
    returns = torch.from_numpy(0.9 + 0.1 * noise[0])
    references = torch.from_numpy(0.1 + 0.2 * noise[1])
    held = 0
    for run in range(1_000):
        found = normalised(Interval.of(returns[run]), Interval.of(references[run]), optimum)
        held += truth <= found.high and (found.low <= truth or (known is not None and known[1] is None))
    assert held >= 930


def test_arms_of_unequal_length_are_kept_apart() -> None:
    found = normalised(Interval(0.5, 0.5, 0.9), Interval(0.0, 0.0, 0.3), 1.0)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.5 * 0.3, 0.9))
    above = normalised(Interval(1.5, 1.5, 1.5), Interval(0.0, -0.1, 0.0), 1.0)
    assert (above.low, above.high) == pytest.approx((1.5 - 0.5 * 0.1, 1.5))  # beyond V*, a lower J_ref lowers the share


def test_bounds_of_the_optimum_widen_the_interval() -> None:
    value = Interval(0.6, 0.5, 0.7)
    within = StoredOptimum("bounds", 1.0, 0.9, 1.1, 0.1)
    found = normalised(value, 0.1, within)
    assert found.mean == pytest.approx(0.5 / 0.9)
    assert found.low == pytest.approx(0.4 / 1.0)  # the optimum as high as it can be
    assert found.high == pytest.approx(0.6 / 0.8)  # and as low
    open_above = normalised(value, 0.1, StoredOptimum("bounds", 0.9, 0.9, None, 0.1))
    assert (open_above.low, open_above.high) == pytest.approx((0.4 / 0.8, 0.6 / 0.8))


def test_a_stored_reference_is_a_point_or_an_interval() -> None:
    assert reference_return(StoredOptimum("automaton", 1.0, 1.0, 1.0, 0.25)) == Interval(0.25, 0.25, 0.25)
    assert reference_return(StoredOptimum("bounds", 1.0, 0.9, 1.1, 0.25, 0.5)) == Interval(0.25, -0.25, 0.75)


def test_nothing_to_gain_is_an_error() -> None:
    with pytest.raises(
        InvalidArgumentError, match="`optimum` must be above the return of the reference, 0.5, got 0.5."
    ):
        normalised(Interval(0.6, 0.5, 0.7), 0.5, 0.5)
