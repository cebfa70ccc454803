"""Accuracy, calibration and accuracy against the margin, on judgements whose probabilities are known."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import shifted
from torch import Tensor

from lmgym.feedback.records import Ranking, Ratings, Record
from lmgym.reward_models.examples import Example
from lmgym.reward_models.measures import (
    BINS,
    Measures,
    accuracy_of_prompts,
    correlation,
    measure,
    share_interval,
)


def example(prompt: str, tiers: tuple[tuple[int, ...], ...], strength: float = 0.0) -> Example:
    ranked = [index for group in tiers for index in group]
    pairs = len(ranked) * (len(ranked) - 1) // 2
    record = Record(prompt, tuple(f" {index}" for index in sorted(ranked)), Ranking(tiers))
    return Example(record, ((0,),) * len(ranked), tiers, (strength,) * pairs, None, "ranking")


def simulated(pairs: int, temperature: float = 1.0, seed: int = 0) -> tuple[Tensor, list[Example]]:
    """Pairs of prompts of their own, of which people prefer the better-scored one as Bradley and Terry say."""
    generator = torch.Generator().manual_seed(shifted(seed))
    scores = torch.randn(pairs, 2, generator=generator)
    chance = torch.sigmoid((scores[:, 0] - scores[:, 1]) / temperature)
    first = torch.rand(pairs, generator=generator) < chance
    tiers = [((0,), (1,)) if wins else ((1,), (0,)) for wins in first.tolist()]
    return scores.flatten(), [example(f"prompt {i}", each) for i, each in enumerate(tiers)]


def measured(scores: Tensor, examples: list[Example]) -> Measures:
    found = measure(scores, examples)
    assert found is not None
    return found


def test_accuracy_is_the_mean_over_prompts_and_ties_are_left_out() -> None:
    examples = [
        example("a", ((0,), (1,), (2,))),
        example("b", ((1,), (0,))),
        example("b", ((0,), (1,))),
        example("c", ((0, 1),)),
    ]
    scores = torch.tensor([3.0, 1, 2, 1, 0, 5, 0, 1, 2])
    assert accuracy_of_prompts(scores, examples).tolist() == pytest.approx([2 / 3, 0.5])
    found = measured(scores, examples)
    assert found.accuracy.mean == pytest.approx((2 / 3 + 0.5) / 2)
    assert (found.prompts, found.pairs, found.ties) == (2, 5, 1)


@pytest.mark.seeds
def test_the_calibration_of_scores_that_are_right_is_right_and_that_of_others_is_not() -> None:
    scores, examples = simulated(4000)
    right = measured(scores, examples)
    assert len(right.calibration) == BINS
    assert right.calibration_error < 0.03
    inside = sum(part.share.low <= part.centre <= part.share.high for part in right.calibration)
    assert inside >= BINS - 2
    assert measured(3 * scores, examples).calibration_error > 0.1  # too sure of itself
    assert measured(scores / 3, examples).calibration_error > 0.05
    assert measured(3 * scores, examples).accuracy == right.accuracy


@pytest.mark.seeds
def test_accuracy_rises_with_the_margin_as_people_choose() -> None:
    scores, examples = simulated(4000, temperature=0.5)
    found = measured(scores, examples)
    assert sum(part.pairs for part in found.by_margin) == 4000
    for part in found.by_margin:
        assert part.share.mean == pytest.approx(1 / (1 + math.exp(-2 * part.centre)), abs=0.08)
    centres = [part.centre for part in found.by_margin]
    assert centres == sorted(centres)


def test_strengths_are_binned_and_equal_ones_stay_together() -> None:
    strong = [example(f"s{i}", ((0,), (1,)), 3.0) for i in range(60)]
    weak = [example(f"w{i}", ((0,), (1,)), 1.0) for i in range(60)]
    unknown = [example(f"u{i}", ((0,), (1,))) for i in range(60)]
    scores = torch.cat([torch.tensor([1.0, 0.0]).repeat(60), torch.tensor([1.0, 0, 0, 1]).repeat(60)])
    found = measured(scores, [*strong, *weak, *unknown])
    assert [(part.centre, part.share.mean, part.pairs) for part in found.by_strength] == [
        (1.0, 0.5, 60),
        (3.0, 1.0, 60),
    ]


def test_without_a_preference_there_is_nothing_to_measure() -> None:
    assert measure(torch.zeros(2), [example("a", ((0, 1),))]) is None
    assert measure(torch.zeros(0), []) is None
    single = Example(Record("a", (" b",), Ratings((1.0,), 0, 1)), ((0,),), (), (), (1.0,), "ratings")
    assert measure(torch.zeros(1), [single]) is None


def test_the_interval_is_within_what_a_share_can_be() -> None:
    for shares in (torch.ones(5), torch.tensor([0.0, 1.0] * 10), torch.linspace(0.98, 1, 200)):
        found = share_interval(shares.double())
        assert 0 <= found.low < found.mean + 1e-9 <= found.high + 2e-9 <= 1 + 2e-9


def test_correlation_of_a_constant_is_unknown() -> None:
    assert correlation(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 6])) == pytest.approx(1)
    assert math.isnan(correlation(torch.zeros(1), torch.zeros(1)))
