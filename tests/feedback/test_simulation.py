"""Simulated annotators: every fault is recovered from what they say, and is absent where it is 0."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.annotators import preference_probability
from lmgym.feedback.comparisons import pairs_of
from lmgym.feedback.records import Choice, Ranking, Ratings, Record
from lmgym.feedback.scoring import score_records
from lmgym.feedback.simulation import Annotators

DRAWS = 6000
SCORES = (0.6, 0.0)


def judgements(
    scores: Sequence[float] = SCORES, texts: Sequence[str] | None = None, draws: int = DRAWS, **traits: Any
) -> list[Record]:
    """What is said of many records with the same scores, and texts of their own where none are given."""
    people = Annotators(**{"ask": "choice", **traits})
    names = [tuple(texts or (f" {i} {k}" for k in range(len(scores)))) for i in range(draws)]
    return list(people.judge((Record("p", name, id=str(i)), scores) for i, name in enumerate(names)))


def share(records: Sequence[Record], better: int = 0) -> float:
    """How often a completion is the preferred one."""
    return float(np.mean([record.judgement.preferred == better for record in records]))  # type: ignore[union-attr]


def near(expected: float, draws: int = DRAWS) -> Any:
    return pytest.approx(expected, abs=4 * math.sqrt(max(expected * (1 - expected), 1e-3) / draws))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_choices_are_bradley_terry(temperature: float) -> None:
    expected = float(preference_probability(*SCORES, temperature))
    found = share(judgements(temperature=temperature))
    assert found == near(expected)
    assert 0.6 / math.log(found / (1 - found)) == pytest.approx(temperature, rel=0.3)


def test_rankings_are_plackett_luce() -> None:
    scores = np.array([0.5, 0.0, -0.5])
    weights = np.exp(scores / 0.8)
    records = judgements(tuple(scores), ask="ranking", temperature=0.8)
    found = Counter(tuple(group[0] for group in record.judgement.tiers) for record in records)  # type: ignore[union-attr]
    for order in itertools.permutations(range(3)):
        expected = math.prod(weights[i] / weights[list(order[n:])].sum() for n, i in enumerate(order))
        assert found[order] / DRAWS == near(expected)


def test_without_noise_and_faults_nobody_errs() -> None:
    assert share(judgements(temperature=0.0, draws=200)) == 1
    for ask in ("ranking", "rating"):
        for record in judgements((3.0, 1.0, 2.0), ask=ask, temperature=0.0, draws=20):
            assert {(pair.better, pair.worse) for pair in pairs_of(record)} == {(0, 2), (0, 1), (2, 1)}


@pytest.mark.parametrize("lapse", [0.1, 0.6])
def test_the_lapse_rate_is_recovered(lapse: float) -> None:
    assert 2 * (1 - share(judgements(temperature=0.0, lapse=lapse))) == near(lapse, DRAWS // 4)
    ranked = judgements((3.0, 1.0, 2.0), ask="ranking", temperature=0.0, lapse=lapse)
    right = np.mean([record.judgement == Ranking.of_order([0, 2, 1]) for record in ranked])
    assert (1 - right) * 6 / 5 == near(lapse)


@pytest.mark.parametrize("bias", [0.8, -0.8])
def test_the_position_bias_is_recovered(bias: float) -> None:
    for ask in ("choice", "ranking"):
        records = judgements((0.0, 0.0), ask=ask, position_bias=bias, temperature=0.5)
        first = np.mean([pairs_of(record)[0].better == record.order_shown[0] for record in records])  # type: ignore[index]
        assert first == near(float(preference_probability(bias, 0.0, 0.5)))
        shown = np.mean([record.order_shown[0] == 0 for record in records])  # type: ignore[index]
        assert shown == near(0.5)


def test_the_length_bias_is_recovered() -> None:
    records = judgements((0.0, 0.0), (" a b c d e", " a b"), length_bias=0.4)
    assert share(records) == near(float(preference_probability(3 * 0.4, 0.0, 1.0)))


def test_the_bias_of_annotators_is_a_taste_of_each_that_stays() -> None:
    """Over annotators a difference has normal noise of sqrt(2) times the bias; asked again each says the same."""
    bias = 0.7
    records = judgements(temperature=0.0, annotator_bias=bias)
    expected = 0.5 * (1 + math.erf(SCORES[0] / (bias * math.sqrt(2)) / math.sqrt(2)))
    assert share(records) == near(expected)
    again = judgements(texts=(" a", " b"), temperature=0.0, annotator_bias=bias, annotators=300, draws=2)
    by_person: dict[str | None, list[int]] = {}
    for record in again:
        by_person.setdefault(record.annotator, []).append(record.judgement.preferred)  # type: ignore[union-attr]
    assert len(by_person) == 300
    assert all(first == second for first, second in by_person.values())
    assert np.mean([first == 0 for first, _ in by_person.values()]) == near(expected, 300)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_circles_are_as_frequent_as_asked(rate: float) -> None:
    records = judgements((2.0, 1.0, 0.0), draws=2000, temperature=0.0, intransitive=rate)
    wins = {record.id: record.judgement.preferred for record in records}  # type: ignore[union-attr]
    circles = np.mean([wins[f"{i}/simulated-0/0-2"] == 2 for i in range(2000)])  # 0 before 1 before 2 before 0
    assert circles == near(rate, 2000)
    assert not any(
        record.judgement.preferred == 2  # type: ignore[union-attr]
        for record in judgements((2.0, 1.0, 0.0), draws=50, temperature=0.0)
    )


@pytest.mark.parametrize("ask", ["choice", "ranking"])
def test_the_threshold_of_ties_is_recovered(ask: str) -> None:
    threshold = 0.5
    records = judgements(ask=ask, tie_threshold=threshold)
    ties = np.mean([pairs_of(record)[0].tie for record in records])
    below = preference_probability(threshold, SCORES[0], 1.0)
    assert ties == near(float(below - preference_probability(-threshold, SCORES[0], 1.0)))
    assert not any(pairs_of(record)[0].tie for record in judgements(ask=ask, draws=100))


def test_ratings_are_rounded_utilities_on_the_scale() -> None:
    (record,) = judgements((-9.0, 1.4, 2.0, 9.0), ask="rating", temperature=0.0, draws=1, rating_center=1.0)
    assert record.judgement == Ratings((1, 4, 5, 7), 1, 7)
    noisy = judgements((0.0, 0.0), ask="rating", draws=2000, high=100, rating_step=0.1)
    values = [value for record in noisy for value in record.judgement.values]  # type: ignore[union-attr]
    assert np.std(values) == pytest.approx(10 * math.pi / math.sqrt(6), rel=0.1)


def test_equal_seeds_say_the_same_and_more_annotators_change_nobody() -> None:
    few = judgements(draws=20, annotators=2)
    many = judgements(draws=20, annotators=3)
    assert few == [record for record in many if record.annotator != "simulated-2"]
    assert few != judgements(draws=20, annotators=2, seed=1)
    assert len({record.id for record in many}) == 60
    first = [record.judgement for record in many if record.annotator == "simulated-0"]
    assert first != [record.judgement for record in many if record.annotator == "simulated-1"]


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"annotators": 0}, "`annotators` must be an int >= 1, got 0."),
        ({"ask": "rank"}, "`ask` must be one of .* Did you mean 'ranking'?"),
        ({"temperature": -1}, "`temperature` must be a finite number >= 0, got -1."),
        ({"lapse": 1.5}, "`lapse` must be a finite number >= 0 and <= 1, got 1.5."),
        ({"intransitive": 0.5}, "`intransitive` must be 0 where `ask` is 'ranking', .* ask=choice can."),
        ({"ask": "rating", "tie_threshold": 0.1}, "`tie_threshold` must be 0 where `ask` is 'rating'"),
        ({"low": 3, "high": 3}, "`high` must be an int >= 4, got 3."),
    ],
)
def test_traits_that_cannot_be_are_refused(traits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Annotators(**traits)


# --- the hidden scores


def test_scores_come_from_a_column_a_function_or_a_task() -> None:
    records = [Record(f"p{i}", (" a", " bb"), columns={"gold": [1, i]}) for i in range(3)]
    assert [scores for _, scores in score_records(records, by="gold")] == [[1, 0], [1, 1], [1, 2]]
    by_function = list(score_records(records, by="feedback.test_simulation:num_letters"))
    assert [scores for _, scores in by_function] == [[2.0, 3.0]] * 3
    assert [record for record, _ in by_function] == records


def num_letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_a_task_scores_as_its_environment_does() -> None:
    from lmgym.tasks import make_task

    task = make_task("keyword-8")
    prompt = task.prompts["test"][0]
    lm = task.reference()
    ids = lm.encode(prompt)
    texts = lm.completions([ids] * 2, [[3, 4], [5, 6]])
    record = Record(str(prompt), tuple(texts), columns={"task": "keyword-8"})
    ((_, scores),) = score_records([record])
    columns = {"prompt_ids": [ids] * 2, "completion_ids": [[3, 4], [5, 6]]}
    assert scores == list(task.reward_function()([str(prompt)] * 2, texts, **columns))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`task` or `score` must be given, since record 1 does not name a task in its column 'task'"),
        (
            {"by": "gold"},
            "`score` must be a column with a number for each .* record 1 has None under 'gold'",
        ),
        ({"by": "nowhere:f"}, "must be an import path 'package.module:function', got 'nowhere:f'"),
        ({"task": "review"}, "Did you mean 'reviews'?"),
        ({"task": "reviews", "by": "gold"}, "`task` and `score` must not both be given."),
    ],
)
def test_scores_from_nowhere_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(score_records([Record("p", (" a", " b"))], **arguments))


def test_scores_that_are_none_are_refused() -> None:
    for scores in ([1.0], [1.0, math.nan]):
        with pytest.raises(InvalidArgumentError, match="`scores` must be 2 finite numbers, one a completion, got"):
            list(Annotators().judge([(Record("p", (" a", " b")), scores)]))


def test_a_choice_names_the_two_that_were_shown() -> None:
    records = judgements((0.0, 0.0, 0.0), draws=5)
    assert len(records) == 15
    for record in records:
        assert isinstance(record.judgement, Choice)
        assert set(record.order_shown or ()) == {record.judgement.preferred, record.judgement.other}
