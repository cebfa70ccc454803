"""What an ensemble disagrees about: the spread of margins, against a loop."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from reward_texts import make_gpt2, make_tokenizer

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.records import Completion, Record
from lmgym.feedback.store import COLUMN
from lmgym.reward_models.disagreement import add_disagreement, margin_spread, measure_disagreement, most_disputed
from lmgym.reward_models.starting import starting_model
from lmgym.reward_models.training import generator_of
from lmgym.rewards.classifier import ClassifierReward
from lmgym.rewards.ensemble import EnsembleReward


def spread_by_hand(scores: np.ndarray) -> float:
    members, count = scores.shape
    found = []
    for i, j in itertools.combinations(range(count), 2):
        margins = [scores[member, i] - scores[member, j] for member in range(members)]
        mean = sum(margins) / members
        found.append((sum((margin - mean) ** 2 for margin in margins) / (members - 1)) ** 0.5)
    return sum(found) / len(found)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (4, 5)])
def test_the_spread_is_that_of_a_loop(shape: tuple[int, int]) -> None:
    scores = np.random.default_rng(0).normal(size=shape)
    assert margin_spread(scores) == pytest.approx(spread_by_hand(scores))


def test_a_member_that_likes_all_of_them_more_does_not_disagree() -> None:
    scores = np.array([[0.0, 1.0, 3.0], [10.0, 11.0, 13.0]])
    assert scores.std(0, ddof=1).min() > 7  # what the spread of the scores themselves would say
    assert margin_spread(scores) == 0


def test_the_most_disputed_come_first_and_equal_ones_as_they_stand() -> None:
    assert most_disputed([0.1, 0.5, 0.3, 0.5, 0.0], 3) == [1, 3, 2]
    assert most_disputed([0.2, 0.2], 9) == [0, 1]
    assert most_disputed([], 2) == []


def test_records_are_scored_one_by_one_as_all_at_once() -> None:
    tokenizer: Any = make_tokenizer()
    members = [
        ClassifierReward(starting_model(make_gpt2(), tokenizer, generator_of(seed)), tokenizer) for seed in range(3)
    ]
    ensemble = EnsembleReward(members)
    texts = [(" good", " bad"), (" dull", " good good", " bad . <eos>"), (Completion(" fine", ended=True), " bad")]
    records = [Record("the film was", completions) for completions in texts]
    together = measure_disagreement(records, ensemble)
    assert together == pytest.approx([measure_disagreement([record], ensemble)[0] for record in records], abs=1e-5)
    for record, found in zip(records, together, strict=True):
        whole = [f"the film was{c.text}{' <eos>' if c.ended else ''}" for c in record.completions]
        scores = np.array([member([""] * len(whole), whole) for member in members])
        assert found == pytest.approx(spread_by_hand(scores), abs=1e-5)
    assert measure_disagreement([], ensemble) == []


def test_a_member_that_is_no_reward_model_is_refused() -> None:
    def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(InvalidArgumentError, match="`ensemble` must have reward models alone, got function"):
        measure_disagreement([Record("p", (" a", " b"))], EnsembleReward([length, length]))


def test_records_get_the_column_that_the_labelling_page_goes_by() -> None:
    tokenizer: Any = make_tokenizer()
    models = [starting_model(make_gpt2(), tokenizer, generator_of(seed)) for seed in range(2)]
    ensemble = EnsembleReward([ClassifierReward(model, tokenizer) for model in models])
    records = [Record("the film was", (" good" * (i % 5), " bad"), columns={"n": 1}) for i in range(70)]
    found = list(add_disagreement(iter(records), ensemble))
    assert [record.columns["n"] for record in found] == [1] * 70
    expected = measure_disagreement(records, ensemble)
    assert [record.columns[COLUMN] for record in found] == pytest.approx(expected, abs=1e-5)
