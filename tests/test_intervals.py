"""Intervals against scipy, closed forms, and the share of simulated samples whose interval holds the mean."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from lmgym.intervals import Interval, t_quantile


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Student's t -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 7.5, 100, math.inf])
def test_the_quantile_is_students(freedom: float) -> None:
    assert t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom))


def test_the_interval_of_independent_numbers_is_scipys() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 9.0])
    found = Interval.of(x)
    expected = scipy.stats.ttest_1samp(x.double().numpy(), 0.0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((4.0, expected.low, expected.high))
    assert Interval.of(torch.tensor([3.0])) == Interval(3.0, -math.inf, math.inf)


def test_over_repeats_only_the_noise_of_the_repeats_counts() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 16.0]])
    found = Interval.over_repeats(x)
    error = math.sqrt((1 + 12) / 3) / 2  # variances of the two means, and the two prompts' mean
    freedom = 2 * (1 + 12) ** 2 / (1 + 12**2)  # Satterthwaite's
    half = scipy.stats.t.ppf(0.975, freedom) * error
    assert (found.mean, found.low, found.high) == pytest.approx((7.0, 7 - half, 7 + half))
    assert half < Interval.of(x.mean(1)).high - 7  # how prompts differ is no part of it


def test_over_repeats_of_one_prompt_is_that_of_independent_numbers() -> None:
    x = torch.randn((1, 6), generator=generator())
    found, expected = Interval.over_repeats(x), Interval.of(x[0])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_over_repeats_degenerate() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 16.0]])
    assert Interval.over_repeats(x[:, :1]) == Interval(5.5, -math.inf, math.inf)
    assert Interval.over_repeats(torch.ones((2, 3))) == Interval.point(1.0)
    dead = Interval.over_repeats(torch.tensor([[1.0, -math.inf], [0.0, 1.0]]))
    assert (dead.low, dead.high) == (-math.inf, -math.inf)


def test_students_interval_covers_at_two_numbers_and_the_normal_one_does_not() -> None:
    """Normal numbers, two of each: 1.96 standard errors hold the mean in 70 % of all samples (atan(1.96) 2 / pi)."""
    draws = torch.randn((2000, 2), generator=generator(1))
    found = [Interval.of(row) for row in draws]
    assert sum(i.low < 0 < i.high for i in found) / 2000 == pytest.approx(0.95, abs=0.02)
    normal = (
        [i.mean - (i.mean - i.low) * 1.96 / t_quantile(1) for i in found],
        [i.mean + (i.high - i.mean) * 1.96 / t_quantile(1) for i in found],
    )
    covered = sum(low < 0 < high for low, high in zip(*normal, strict=True)) / 2000
    assert covered == pytest.approx(2 / math.pi * math.atan(1.96), abs=0.03)


@pytest.mark.parametrize(("prompts", "repeats"), [(1, 2), (10, 2), (10, 8), (50, 3)])
def test_over_repeats_covers_at_any_number_of_them(prompts: int, repeats: int) -> None:
    means = torch.arange(float(prompts))[:, None]
    spreads = torch.rand((prompts, 1), generator=generator(3)) + 0.2
    draws = means + spreads * torch.randn((1500, prompts, repeats), generator=generator(4))
    found = [Interval.over_repeats(x) for x in draws]
    assert 0.935 < sum(i.low < means.mean() < i.high for i in found) / 1500 < 0.985
