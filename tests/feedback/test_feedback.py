"""Simulated annotators, conversations and demonstrations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from conftest import word_tokenizer

from lmgym.data.rows import Row
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.annotators import plackett_luce_ranking, preference_probability, true_ranking
from lmgym.feedback.demonstrations import read_demonstration, read_demonstrations
from lmgym.feedback.files import read_records
from lmgym.feedback.records import Choice, Completion, Correction, Record
from lmgym.feedback.rendering import render_record

SCORES = np.array([0.3, -1.2, 0.9, 0.1])
DRAWS = 40_000


def positions(ranking: np.ndarray) -> np.ndarray:
    """(B, K) place of each response: the inverse permutation."""
    return np.argsort(ranking, axis=1)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_every_pair_of_a_plackett_luce_ranking_is_bradley_terry(temperature: float) -> None:
    ranking = plackett_luce_ranking(np.tile(SCORES, (DRAWS, 1)), temperature, np.random.default_rng(0))
    position = positions(ranking)
    for i, j in itertools.combinations(range(len(SCORES)), 2):
        expected = 1 / (1 + math.exp(-(SCORES[i] - SCORES[j]) / temperature))
        error = math.sqrt(expected * (1 - expected) / DRAWS)
        assert (position[:, i] < position[:, j]).mean() == pytest.approx(expected, abs=4 * error)
        assert preference_probability(SCORES[i], SCORES[j], temperature) == pytest.approx(expected)


def test_whole_rankings_follow_plackett_luce() -> None:
    temperature = 0.7
    ranking = plackett_luce_ranking(np.tile(SCORES, (DRAWS, 1)), temperature, np.random.default_rng(1))
    weights = np.exp(SCORES / temperature)
    for order in itertools.permutations(range(4)):
        expected = math.prod(weights[i] / weights[list(order[position:])].sum() for position, i in enumerate(order))
        frequency = (ranking == np.array(order)).all(axis=1).mean()
        assert frequency == pytest.approx(expected, abs=4 * math.sqrt(expected / DRAWS))


def test_gaussian_noise_of_the_same_spread_would_be_rejected() -> None:
    # The test above has teeth: noise of another distribution, scaled to the variance of a Gumbel, fails its tolerance.
    rng = np.random.default_rng(2)
    scores = np.array([2.5, 0.0])
    noisy = np.tile(scores, (DRAWS, 1)) + rng.normal(scale=math.pi / math.sqrt(6), size=(DRAWS, 2))
    expected = float(preference_probability(2.5, 0.0, 1.0))
    assert abs((noisy[:, 0] > noisy[:, 1]).mean() - expected) > 4 * math.sqrt(expected * (1 - expected) / DRAWS)


def test_cold_annotators_never_err_and_hot_ones_toss_coins() -> None:
    scores = np.random.default_rng(3).normal(size=(2000, 5))
    cold = plackett_luce_ranking(scores, 1e-9, np.random.default_rng(4))
    assert (cold == true_ranking(scores)).all()
    hot = positions(plackett_luce_ranking(scores, 1e9, np.random.default_rng(5)))
    assert (hot[:, 0] < hot[:, 1]).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))


def test_true_ranking_is_best_first_and_stable() -> None:
    assert true_ranking([[0.0, 2.0, 1.0], [1.0, 1.0, 3.0]]).tolist() == [[1, 2, 0], [2, 0, 1]]


def test_equal_generators_give_equal_rankings() -> None:
    scores = np.zeros((10, 4))
    first, again = (plackett_luce_ranking(scores, 1.0, np.random.default_rng(6)) for _ in range(2))
    assert (first == again).all()


def test_preference_probability_survives_huge_margins() -> None:
    assert preference_probability([1e6, -1e6], 0.0, 1e-3).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "hot"])
def test_a_temperature_that_cannot_be_is_rejected(temperature: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`temperature` must be a finite number > 0, got"):
        plackett_luce_ranking(np.zeros((1, 2)), temperature, np.random.default_rng(0))


@pytest.mark.parametrize("scores", [[1.0, 2.0], [[1.0], [2.0]], [[[1.0, 2.0]]]])
def test_scores_must_be_a_table(scores: list) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`scores` must have shape \(B, K\) with K >= 2, got \("):
        true_ranking(scores)


def test_scores_must_be_finite() -> None:
    with pytest.raises(InvalidArgumentError, match="`scores` must be finite numbers"):
        true_ranking([[1.0, math.nan]])


# --- conversations and demonstrations

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "the film was"), ("assistant", "good"), ("assistant", "bad"))
)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> \n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (record,) = read_records([{"chosen": [USER, GOOD], "rejected": [USER, BAD], "rejected_ended": False}])
    texts = render_record("source", record, tokenizer, "row 1")
    assert texts.prompt == "user : the film was <eos> \nassistant :"
    assert [completion.text for completion in texts.completions] == [" good <eos>", " bad "]
    with pytest.raises(InvalidArgumentError, match="must be texts where there is no tokenizer"):
        render_record("source", record, None, "row 1")


def test_a_complete_text_ends_with_the_eos_once() -> None:
    completions = (
        Completion(" a", ended=True),
        Completion(" b <eos>", ended=True),
        " c",
        Completion(" d", ended=False),
    )
    record = Record("p", completions)
    texts = [completion.text for completion in render_record("source", record, word_tokenizer(), "").completions]
    assert texts == [" a<eos>", " b <eos>", " c", " d"]
    assert render_record("source", record, None, "").completions == record.completions


def test_a_template_that_rewrites_the_question_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    (record,) = read_records([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}])
    with pytest.raises(InvalidArgumentError, match="in the same way with and without its answer, and row 1 becomes"):
        render_record("source", record, tokenizer, "row 1")


def test_what_people_prefer_is_a_demonstration() -> None:
    tokenizer = word_tokenizer()
    (pair,) = read_records([{"prompt": "s", "chosen": " d", "rejected": " e"}])
    records = [
        Record("p", (" a", " b"), Choice(1, 0)),
        Record("q", (" a", " b"), Choice(1, 0, strength=0)),
        Record("r", (" a",), Correction(0, " c")),
        pair,
    ]
    assert list(read_demonstrations("path", records, tokenizer)) == [
        ("p", " b", "record 1 of `path`"),
        ("r", " c<eos>", "record 3 of `path`"),
        ("s", " d<eos>", "record 4 of `path`"),
    ]


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"prompt": "a film", "completion": " good <eos>", "id": 3}, ("a film", " good <eos>")),
        ({"prompt": [USER], "completion": [GOOD]}, ("user : the film was <eos> \nassistant :", " good <eos>")),
        ({"messages": [USER, GOOD]}, ("user : the film was <eos> \nassistant :", " good <eos>")),
    ],
)
def test_demonstrations_are_texts_or_conversations(row: dict, read: tuple[str, str]) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert read_demonstration("path", Row(row, "line 1"), tokenizer) == read


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"rows with a \"completion\", and line 1 has the columns \['prompt'\]"),
        ({"prompt": "a", "completion": 3}, "non-empty texts, and line 1 is 3"),
        ({"messages": [USER]}, "messages that end with the assistant's, and line 1 has"),
        ({"text": "a"}, r"rows with a \"prompt\", and line 1 has the columns \['text'\]"),
    ],
)
def test_a_broken_demonstration_is_named(row: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_demonstration("path", Row(row, "line 1"), None)
