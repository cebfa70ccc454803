"""Simulated annotators and the format of rankings."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import word_tokenizer

from lmgym.data.rows import Row
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.annotators import plackett_luce_ranking, preference_probability, true_ranking
from lmgym.feedback.pairs import read_demonstration
from lmgym.feedback.preferences import Rankings

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


# --- the format

RANKINGS = Rankings(
    ["the film was", "the café was"],
    [[" good . <eos>", " bad . <eos>", ' "so" so'], [" 💥 . <eos>", " dull\n.", " <eos>"]],
    [[0, 2, 1], [2, 0, 1]],
)


def test_rankings_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    RANKINGS.save(path)
    assert Rankings.load(path) == RANKINGS
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [["completions", "prompt", "ranking"]] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["rankings.jsonl"]


def test_rankings_do_not_change_with_the_lists_they_were_made_from() -> None:
    prompts = ["a"]
    completions = [[" b", " c"]]
    ranking = np.array([[1, 0]])
    rankings = Rankings(prompts, completions, ranking)
    prompts.append("x")
    completions[0][0] = "x"
    ranking[0, 0] = 0
    assert rankings == Rankings(["a"], [[" b", " c"]], [[1, 0]])
    assert (len(rankings), rankings.num_ranked) == (1, 2)
    assert (len(Rankings([], [], [])), Rankings([], [], []).num_ranked) == (0, 0)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rankings.jsonl"
    RANKINGS.save(path)

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        Rankings(["a"], [[" b", " c"]], [[0, 1]]).save(path)
    monkeypatch.undo()
    assert Rankings.load(path) == RANKINGS
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("prompts", "completions", "ranking", "message"),
    [
        (["a"], [], [[0, 1]], "`prompts`, `completions` and `ranking` must have one entry a prompt, got 1, 0 and 1."),
        (["a"], [["b"]], [[0]], r"`completions\[0\]` must hold at least 2 texts, got 1."),
        ([1], [["b", "c"]], [[0, 1]], r"`prompts\[0\]` must be a str, got 1."),
        (["a"], [["b", None]], [[0, 1]], r"`completions\[0\]` must be a list of str, got None in it."),
        (["a"], [["b", "c"]], [[0, 0]], r"`ranking\[0\]` must order the indices 0 to 1, got \[0, 0\]."),
        (["a"], [["b", "c"]], [[0, 1, 2]], r"`ranking\[0\]` must order the indices 0 to 1, got \[0, 1, 2\]."),
        (["a", "d"], [["b", "c"], ["b", "c", "e"]], [[0, 1], [0, 1, 2]], r"`completions\[1\]` must hold 2 texts"),
    ],
)
def test_rankings_that_do_not_fit_are_rejected(prompts: list, completions: list, ranking: list, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Rankings(prompts, completions, ranking)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", ".*, line 3, is not JSON"),
        ("[1]", "must hold texts or rows .* line 3 of"),
        ('{"prompt": "a"}', r"must hold rows with .* or with \['chosen', 'rejected'\], and line 3 of"),
        ('{"prompt": "a", "completions": "bc", "ranking": [0, 1]}', "must hold lists .* unlike line 3 of"),
        ('{"prompt": "a", "completions": ["b", "c"], "ranking": [0, 1.5]}', "must hold integers .* line 3 of"),
        ('{"prompt": "a", "completions": ["b", 3], "ranking": [0, 1]}', "must hold non-empty texts, and line 3 of"),
        ('{"prompt": "a", "chosen": "b", "rejected": null}', "must hold non-empty texts, and line 3 of"),
        ('{"prompt": " ", "chosen": "b", "rejected": "c"}', "must hold non-empty texts, and line 3 of"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rankings.jsonl"
    RANKINGS.save(path)
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=f"`rankings` {message}"):
        Rankings.load(path)


# --- preferences and demonstrations as others write them

CHOSEN = "\n\nHuman: hi\n\nAssistant: hello"
REJECTED = "\n\nHuman: hi\n\nAssistant: go away"


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_of_texts_are_rankings(tmp_path: Path) -> None:
    row = {"prompt": "the film was", "chosen": " good", "rejected": " bad", "annotator": 3}
    pairs = Rankings.load(write(tmp_path / "pairs.ndjson", row))
    assert pairs == Rankings(["the film was"], [[" good", " bad"]], [[0, 1]], {"annotator": [3]})
    assert Rankings.load([row]) == pairs
    tokenizer = word_tokenizer()
    ended = Rankings.load([row | {"rejected": " bad<eos>"}], tokenizer)
    assert ended.completions == ((" good<eos>", " bad<eos>"),)


def test_a_prompt_that_both_sides_begin_with_is_taken_off() -> None:
    pairs = Rankings.load([{"chosen": CHOSEN, "rejected": REJECTED}])
    assert pairs.prompts == ("\n\nHuman: hi\n\nAssistant:",)
    assert pairs.completions == ((" hello", " go away"),)
    with pytest.raises(InvalidArgumentError, match="must hold non-empty texts, and item 0 is ''"):
        Rankings.load([{"chosen": "a", "rejected": "b"}])


USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "the film was"), ("assistant", "good"), ("assistant", "bad"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "the film was", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_pairs_of_conversations_go_through_the_chat_template(row: dict) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> \n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
    )
    pairs = Rankings.load([row], tokenizer)
    assert pairs.prompts == ("user : the film was <eos> \nassistant :",)
    assert pairs.completions == ((" good <eos>", " bad <eos>"),)
    with pytest.raises(InvalidArgumentError, match="must be texts where there is no tokenizer"):
        Rankings.load([row])


def test_a_template_that_rewrites_the_question_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InvalidArgumentError, match="in the same way with and without its answer, and item 0 becomes"):
        Rankings.load([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}], tokenizer)


@pytest.mark.parametrize(
    "row", [{"chosen": [USER], "rejected": [USER, BAD]}, {"prompt": [USER], "chosen": [USER], "rejected": [BAD]}]
)
def test_conversations_without_an_answer_are_refused(row: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="share a question and have an answer each, and item 0 has"):
        Rankings.load([row], word_tokenizer())


def test_other_columns_are_kept_on_disk(tmp_path: Path) -> None:
    rankings = Rankings(["a"], [[" b", " c"]], [[1, 0]], {"annotator": [3], "notes": [["x"]]})
    rankings.save(tmp_path / "r.jsonl")
    assert Rankings.load(tmp_path / "r.jsonl") == rankings
    with pytest.raises(InvalidArgumentError, match=r"`columns\['id'\]` must have one value a prompt, 1, got 2"):
        Rankings(["a"], [[" b", " c"]], [[1, 0]], {"id": [1, 2]})


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
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> \n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
    )
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
