"""Intervals against scipy, closed forms, and the share of simulated samples whose interval holds the mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from lmgym.intervals import RARE, Interval, is_rare, of_episodes, t_quantile


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
    found = Interval.over_repeats(x)
    expected = Interval.of(x[0])
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


# --- bounded numbers ---------------------------------------------------------------------------------------------


def binary(successes: int, n: int) -> torch.Tensor:
    return (torch.arange(n) < successes).double()


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (0, 2), (1, 2), (0, 8), (3, 8), (8, 8), (1, 100), (0, 4096), (1, 4096), (4000, 4096)]
)
def test_of_two_values_it_is_clopper_and_pearson(successes: int, n: int) -> None:
    found = Interval.bounded(binary(successes, n), 0.0, 1.0)
    exact = scipy.stats.binomtest(successes, n).proportion_ci(0.95, "exact")
    assert found.mean == pytest.approx(successes / n)
    assert found.low <= exact.low + 1e-6
    assert found.high >= exact.high - 1e-6
    assert found.mean - found.low == pytest.approx(found.mean - exact.low, rel=0.005)
    assert found.high - found.mean == pytest.approx(exact.high - found.mean, rel=0.005)


def test_the_bounds_are_quantiles_under_random_weights() -> None:
    """Gaffke's own definition, by Monte Carlo."""
    x = torch.rand(20, generator=generator(2), dtype=torch.float64) ** 4
    weights = np.random.default_rng(0).dirichlet(np.ones(21), 100_000)
    found = Interval.bounded(x, -0.5, 1.2)
    assert found.high == pytest.approx(np.quantile(weights @ np.append(x, 1.2), 0.975), abs=0.004)
    assert found.low == pytest.approx(np.quantile(weights @ np.append(x, -0.5), 0.025), abs=0.004)


def test_of_many_numbers_it_is_students() -> None:
    x = torch.rand(4096, generator=generator(5), dtype=torch.float64)
    found = Interval.bounded(x, 0.0, 1.0)
    expected = Interval.of(x)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=3e-4)


def test_what_was_never_seen_may_happen_once_in_n_times() -> None:
    alike = Interval.bounded(torch.full((4096,), 0.3), 0.0, 1.0)
    assert alike.high - 0.3 == pytest.approx(0.7 * 3.69 / 4096, rel=0.01)
    assert 0.3 - alike.low == pytest.approx(0.3 * 3.69 / 4096, rel=0.01)
    assert Interval.bounded(torch.ones(5), 1.0, 1.0) == Interval.point(1.0)


@pytest.mark.parametrize("n", [2, 8, 30])
@pytest.mark.parametrize("power", [0.2, 1.0, 6.0])
def test_bounded_numbers_are_covered_however_few(n: int, power: float) -> None:
    """The mean of u^power, skewed either way; Student's interval of 8 such numbers can fail one time in three."""
    draws = torch.rand((400, n), generator=generator(n), dtype=torch.float64) ** power
    found = [Interval.bounded(x, 0.0, 1.0) for x in draws]
    assert sum(i.low <= 1 / (1 + power) <= i.high for i in found) / 400 > 0.93


def test_numbers_that_are_not_finite_have_no_interval() -> None:
    found = Interval.bounded(torch.tensor([0.0, math.inf]), 0.0, 1.0)
    assert (found.mean, found.low, found.high) == (math.inf, math.inf, math.inf)


def test_prompts_that_differ_do_not_harm() -> None:
    """Hoeffding (1956): successes of different probability vary less than those of their mean."""
    p = torch.tensor([[0.0], [0.001], [0.02], [0.3]], dtype=torch.float64)
    draws = (torch.rand((1000, 4, 50), generator=generator(6)) < p).double()
    found = [Interval.bounded(x.flatten(), 0.0, 1.0) for x in draws]
    assert sum(i.low <= p.mean() <= i.high for i in found) / 1000 > 0.95


# --- episodes ----------------------------------------------------------------------------------------------------


def numbers(score: torch.Tensor, kl: torch.Tensor, kl_coef: float = 0.1) -> dict[str, torch.Tensor]:
    return {"score": score, "kl": kl, "return": score - kl_coef * kl, "length": torch.full_like(score, 5.0)}


GIVEN = {"kl_coef": 0.1, "gamma": 1.0, "horizon": 8}


def test_scores_are_rare_until_fifty_of_them_differ() -> None:
    assert is_rare(binary(RARE - 1, 4096), known=True)
    assert is_rare(1 - binary(RARE - 1, 4096), known=True)
    assert not is_rare(binary(RARE, 4096), known=True)
    assert is_rare(torch.rand(20), known=True)  # too few in all
    assert not is_rare(torch.rand(20), known=False)  # who knows how far they go: Student's
    assert is_rare(binary(3, 20), known=False)


def test_often_seen_scores_have_students_interval() -> None:
    score = torch.rand((4, 100), generator=generator(7), dtype=torch.float64)
    found = of_episodes(numbers(score, score - 0.5), score_range=(0.0, 1.0), **GIVEN)
    for name in ("score", "kl", "return"):
        expected = Interval.over_repeats(numbers(score, score - 0.5)[name])
        assert (found[name].low, found[name].high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_no_success_is_not_a_success_rate_of_zero() -> None:
    nothing = torch.zeros((4, 1024), dtype=torch.float64)
    found = of_episodes(numbers(nothing, nothing), score_range=(0.0, 1.0), **GIVEN)
    assert found["score"].high == pytest.approx(3.69 / 4096, rel=0.01)
    assert found["return"].high >= found["score"].high
    assert found["kl"].high > 0
    unknown = of_episodes(numbers(nothing, nothing), **GIVEN)  # a reward that does not say is taken to pay 0 or 1
    assert unknown["score"].high == pytest.approx(found["score"].high)
    ten = of_episodes(numbers(nothing, nothing), score_range=(-2.0, 10.0), **GIVEN)
    assert ten["score"].high == pytest.approx(10 * 3.69 / 4096, rel=0.01)
    assert ten["score"].low == pytest.approx(-2 * 3.69 / 4096, rel=0.01)


def test_equal_returns_of_different_scores_have_a_narrow_interval_that_is_no_point() -> None:
    """As those of pi*, where the log-ratio makes up for the score in every episode."""
    score = torch.rand((4, 100), generator=generator(8), dtype=torch.float64)
    found = of_episodes(numbers(score, (score - 0.6) / 0.1), score_range=(0.0, 1.0), **GIVEN)["return"]
    assert found.mean == pytest.approx(0.6)
    assert 0 < found.high - found.low < 1e-4
    assert not found.exact


def test_a_sample_of_prompts_is_measured_over_prompts() -> None:
    score = torch.rand((80, 1), generator=generator(9), dtype=torch.float64) + torch.rand((80, 4), dtype=torch.float64)
    found = of_episodes(numbers(score, score), score_range=(0.0, 2.0), whole=False, **GIVEN)["score"]
    expected = Interval.of(score.mean(1))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    once = of_episodes(numbers(score[:, :1], score[:, :1]), score_range=(0.0, 2.0), **GIVEN)["score"]
    expected = Interval.of(score[:, 0])
    assert (once.low, once.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_without_a_price_there_is_no_kl() -> None:
    score = binary(3, 40).view(4, 10)
    found = of_episodes({"score": score, "return": score}, kl_coef=0.0, gamma=1.0, horizon=8, score_range=(0.0, 1.0))
    assert found["return"] == found["score"]
