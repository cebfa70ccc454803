"""Losses of reward models: each beside a slow, obvious twin, in value and in gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from conftest import shifted
from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.rewards.ranking import (
    MAX_TIED,
    Comparisons,
    kwise_loss,
    pair_accuracy,
    pair_losses,
    pairwise_loss,
    plackett_luce_loss,
    ranking_accuracy,
    regression_loss,
)

Tiers = Sequence[Sequence[int]]
# Ties at the top, in the middle, at the bottom; unranked completions; two alone; everything tied.
RANKINGS: list[Tiers] = [
    [[2], [0], [1]],
    [[0, 3], [1], [4]],
    [[1], [0, 2, 4], [3]],
    [[5], [2], [1, 3]],
    [[1], [0]],
    [[0, 1]],
]
SIZES = [3, 5, 5, 7, 2, 2]
STRENGTH = 0.3


def draw_scores(seed: int = 0, sizes: Sequence[int] = SIZES) -> Tensor:
    generator = torch.Generator().manual_seed(shifted(seed))
    return torch.randn(sum(sizes), generator=generator, dtype=torch.float64, requires_grad=True)


def comparisons_of(rankings: Sequence[Tiers] = RANKINGS, sizes: Sequence[int] = SIZES) -> Comparisons:
    found = Comparisons.of_rankings(rankings, sizes)
    strength = STRENGTH * (~found.tied).double()
    return Comparisons(found.better, found.worse, found.tied, strength, found.prompt, found.num_prompts)


def rank_of(tiers: Tiers, index: int) -> int:
    return next(position for position, group in enumerate(tiers) if index in group)


def slow_pairs(scores: Tensor, tiers: Tiers) -> list[tuple[Tensor, Tensor, bool]]:
    """(score of the better, of the worse, tied) of every two ranked completions, straight from the definition."""
    pairs = []
    ranked = [index for group in tiers for index in group]
    for i, j in itertools.combinations(ranked, 2):
        first = rank_of(tiers, i)
        second = rank_of(tiers, j)
        better = min((first, i), (second, j))[1]
        pairs.append((scores[better], scores[i + j - better], first == second))
    return pairs


def slow_pair_loss(better: Tensor, worse: Tensor, tied: bool, margin: float = 0.0, nu: float | None = None) -> Tensor:
    """Bradley & Terry with strengths p = e^r; ties as half of each, or after Davidson (1970)."""
    p = torch.exp(better - (0.0 if tied else margin * STRENGTH))
    q = torch.exp(worse)
    if nu is None:
        first = -torch.log(p / (p + q))
        second = -torch.log(q / (p + q))
        return (first + second) / 2 if tied else first
    even = nu * torch.sqrt(p * q)
    return -torch.log((even if tied else p) / (p + q + even))


def slow_loss(scores: Tensor, each_prompt: bool, margin: float = 0.0, nu: float | None = None) -> Tensor:
    means = []
    every = []
    for own, tiers in zip(scores.split(SIZES), RANKINGS, strict=True):
        losses = [slow_pair_loss(*pair, margin, nu) for pair in slow_pairs(own, tiers)]
        means.append(sum(losses) / len(losses))
        every += losses
    chosen = means if each_prompt else every
    return sum(chosen) / len(chosen)  # type: ignore[return-value]


def assert_same(fast: Callable[[Tensor], Tensor], slow: Callable[[Tensor], Tensor], scores: Tensor) -> None:
    """Values and gradients agree."""
    value = fast(scores)
    expected = slow(scores)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, scores)
    (other,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


# --- pairs


@pytest.mark.seeds
@pytest.mark.parametrize(("margin", "nu"), [(0.0, None), (1.5, None), (0.0, 0.7), (1.5, 0.7)])
def test_the_kwise_loss_is_the_mean_over_prompts_of_the_mean_over_pairs(margin: float, nu: float | None) -> None:
    log_odds = None if nu is None else torch.tensor(math.log(nu), dtype=torch.float64)
    comparisons = comparisons_of()
    assert_same(
        lambda x: kwise_loss(x, comparisons, margin, log_odds),
        lambda x: slow_loss(x, each_prompt=True, margin=margin, nu=nu),
        draw_scores(),
    )
    assert_same(
        lambda x: pairwise_loss(x, comparisons, margin, log_odds),
        lambda x: slow_loss(x, each_prompt=False, margin=margin, nu=nu),
        draw_scores(1),
    )
    scores = draw_scores()
    assert kwise_loss(scores, comparisons).item() != pytest.approx(pairwise_loss(scores, comparisons).item(), rel=1e-3)


def test_the_learned_tie_weight_gets_its_gradient() -> None:
    log_odds = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    comparisons = comparisons_of()
    scores = draw_scores().detach()
    assert torch.autograd.gradcheck(lambda x: kwise_loss(scores, comparisons, 0.0, x), (log_odds,))


def test_davidson_without_ties_is_bradley_terry() -> None:
    comparisons = Comparisons.of_rankings([[[2], [0], [1]]], [3])
    scores = draw_scores(2, [3])
    none = torch.tensor(-math.inf, dtype=torch.float64)
    torch.testing.assert_close(pair_losses(scores, comparisons, 0.0, none), pair_losses(scores, comparisons))


def test_probabilities_of_davidson_sum_to_one() -> None:
    log_odds = torch.tensor(0.2, dtype=torch.float64)
    scores = draw_scores(3, [2])
    total = 0.0
    for tiers in ([[0], [1]], [[1], [0]], [[0, 1]]):
        comparisons = Comparisons.of_rankings([tiers], [2])
        total += math.exp(-pair_losses(scores, comparisons, 0.0, log_odds).item())
    assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("tiers", [[[0], [1]], [[1], [0]], [[0, 1]]])
def test_of_two_completions_all_objectives_are_one(tiers: Tiers) -> None:
    rankings = [tiers] * 4
    scores = draw_scores(4, [2] * 4)
    comparisons = Comparisons.of_rankings(rankings, [2] * 4)
    for other in (
        lambda x: pairwise_loss(x, comparisons),
        lambda x: plackett_luce_loss(x, rankings, [2] * 4),
    ):
        assert_same(lambda x: kwise_loss(x, comparisons), other, scores)


def test_the_loss_of_equal_scores_is_log_two() -> None:
    assert kwise_loss(torch.full((sum(SIZES),), 7.0), comparisons_of()).item() == pytest.approx(math.log(2))


def test_the_loss_does_not_feel_a_shift_of_a_prompt() -> None:
    scores = draw_scores(5)
    shift = torch.repeat_interleave(torch.tensor([1.0, -2, 30, 0, 4, 5]).double(), torch.tensor(SIZES))
    for loss in (
        lambda x: kwise_loss(x, comparisons_of()),
        lambda x: plackett_luce_loss(x, RANKINGS, SIZES),
    ):
        assert loss(scores + shift).item() == pytest.approx(loss(scores).item())


def test_the_loss_is_finite_for_absurd_scores() -> None:
    scores = torch.tensor([1e8, -1e8], requires_grad=True)
    loss = kwise_loss(scores, Comparisons.of_rankings([[[1], [0]]], [2]))
    loss.backward()
    assert loss.item() == pytest.approx(2e8)
    assert scores.grad is not None
    assert scores.grad.tolist() == [1.0, -1.0]


def test_a_completion_that_was_not_ranked_has_no_gradient() -> None:
    scores = draw_scores(6)
    for loss in (kwise_loss(scores, comparisons_of()), plackett_luce_loss(scores, RANKINGS, SIZES)):
        (gradient,) = torch.autograd.grad(loss, scores)
        unranked = [3 + 2, 3 + 5 + 5 + 0, 3 + 5 + 5 + 4, 3 + 5 + 5 + 6]
        assert gradient[unranked].tolist() == [0.0] * 4
        assert gradient[0] != 0


# --- whole rankings


def slow_plackett_luce(scores: Tensor) -> Tensor:
    """The mean over all orders that the ties allow, each as a product of choices."""
    prompts = []
    for own, tiers in zip(scores.split(SIZES), RANKINGS, strict=True):
        orders = []
        for parts in itertools.product(*[itertools.permutations(group) for group in tiers]):
            order = [index for part in parts for index in part]
            nats = torch.zeros((), dtype=torch.float64)
            for position in range(len(order)):
                chances = torch.exp(own[order[position:]])
                nats = nats - torch.log(chances[0] / chances.sum())
            orders.append(nats / (len(order) - 1))
        prompts.append(sum(orders) / len(orders))
    return sum(prompts) / len(prompts)  # type: ignore[return-value]


@pytest.mark.seeds
def test_plackett_luce_is_the_mean_over_the_orders_that_ties_allow() -> None:
    assert_same(lambda x: plackett_luce_loss(x, RANKINGS, SIZES), slow_plackett_luce, draw_scores(7))


def test_too_large_a_tie_is_refused_by_plackett_luce() -> None:
    size = MAX_TIED + 1
    with pytest.raises(InvalidArgumentError, match=f"at most {MAX_TIED} completions in a tie .* got {size}"):
        plackett_luce_loss(torch.zeros(size), [[list(range(size))]], [size])


# --- ratings


def test_regression_is_the_mean_over_prompts_of_the_mean_squared_error() -> None:
    targets = torch.tensor([1.0, math.nan, 3.0, 0.5, -1.0], dtype=torch.float64)
    prompt = torch.tensor([0, 0, 0, 1, 1])

    def slow(x: Tensor) -> Tensor:
        first = ((x[0] - 1) ** 2 + (x[2] - 3) ** 2) / 2
        second = ((x[3] - 0.5) ** 2 + (x[4] + 1) ** 2) / 2
        return (first + second) / 2

    assert_same(lambda x: regression_loss(x, targets, prompt, 2), slow, draw_scores(8, [5]))


# --- accuracy and shapes


def test_accuracy_counts_pairs() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0])
    for order, expected in (([0, 1, 2], 1.0), ([2, 1, 0], 0.0), ([1, 0, 2], 2 / 3)):
        comparisons = Comparisons.of_rankings([[[index] for index in order]], [3])
        assert pair_accuracy(scores, comparisons).mean().item() == pytest.approx(expected)
        assert ranking_accuracy(scores[None], torch.tensor([order])) == pytest.approx(expected)
    assert pair_accuracy(torch.zeros(2), Comparisons.of_rankings([[[0], [1]]], [2])).item() == 0.5
    assert math.isnan(pair_accuracy(torch.zeros(2), Comparisons.of_rankings([[[0, 1]]], [2])).item())


def test_pairs_are_those_that_feedback_makes_of_a_ranking() -> None:
    from lmgym.feedback.comparisons import pairs_of_tiers

    for tiers, size in zip(RANKINGS, SIZES, strict=True):
        made = Comparisons.of_rankings([tiers], [size])
        own = zip(made.better.tolist(), made.worse.tolist(), made.tied.tolist(), strict=True)
        expected = {(pair.better, pair.worse, pair.tie) for pair in pairs_of_tiers(tiers)}
        assert set(own) == expected
        assert len(made.better) == len(expected)


@pytest.mark.parametrize(("shape", "other"), [((2, 3), (2, 2)), ((2, 1), (2, 1)), ((3,), (3,))])
def test_shapes_that_do_not_fit_are_rejected(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"`scores` and `ranking` must both have shape \(B, K\) with K >= 2, got"
    ):
        ranking_accuracy(torch.zeros(shape), torch.zeros(other, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match=r"`scores` must have shape \(N,\), got \(2, 3\)"):
        kwise_loss(torch.zeros(2, 3), comparisons_of())
    with pytest.raises(InvalidArgumentError, match="must rank two completions at least"):
        Comparisons.of_rankings([[[1]]], [2])


def test_the_gradient_of_a_pair_loss_points_the_right_way() -> None:
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.normal(size=3), requires_grad=True)
    kwise_loss(scores, Comparisons.of_rankings([[[2], [0], [1]]], [3])).backward()
    assert scores.grad is not None
    assert scores.grad[2] < 0 < scores.grad[1]
