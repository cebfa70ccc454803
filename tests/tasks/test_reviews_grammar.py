"""The grammar of the reviews task, its prompts, and the gold score."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import time
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from lmgym.tasks import reviews

CORPUS = reviews.corpus(seed=7, size=4000)


def gold(text: str) -> float:
    """Gold score of a text, which must not depend on where the prompt ends."""
    words = text.split()
    scores = {
        reviews.gold([" ".join(words[:cut])], ["".join(f" {word}" for word in words[cut:])])[0]
        for cut in range(len(words) + 1)
    }
    assert len(scores) == 1
    return scores.pop()


# --- the grammar


def test_reviews_are_plain_words_and_end_with_a_full_stop() -> None:
    vocabulary = set(reviews.words())
    for review in CORPUS:
        words = review.split(" ")
        assert set(words) <= vocabulary
        assert words[-1] == "."
        assert review == review.lower()
        assert 5 <= len(words) <= 40


def test_every_word_of_the_vocabulary_is_used() -> None:
    assert {word for review in reviews.corpus(3, 40_000) for word in review.split()} == set(reviews.words())
    assert 250 <= len(reviews.words()) <= 400
    assert reviews.words() == sorted(set(reviews.words()))


def test_articles_agree_with_the_word_that_follows() -> None:
    for review in CORPUS:
        words = review.split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), review


def test_equal_seeds_give_equal_corpora_and_longer_ones_continue_shorter_ones() -> None:
    assert reviews.corpus(7, 50) == CORPUS[:50]
    assert reviews.corpus(8, 50) != CORPUS[:50]
    assert reviews.corpus(8, 0) == []


def test_the_global_generator_is_neither_read_nor_seeded() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    reviews.corpus(1, 20)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_corpus_rejects_a_negative_size() -> None:
    with pytest.raises(ValueError, match=r"`size` must be an int >= 0, got -1\."):
        reviews.corpus(1, -1)


def inside(table: reviews._Table, words: list[str]) -> tuple[float, int]:
    """Probability that a grammar writes a text, and in how many ways: the inside algorithm."""

    @functools.cache
    def spans(symbol: str, start: int) -> dict[int, tuple[float, int]]:
        if symbol not in table:
            matches = start < len(words) and words[start] in (symbol, f"{symbol}n" if symbol == "a" else symbol)
            return {start + 1: (1.0, 1)} if matches else {}
        found: dict[int, tuple[float, int]] = {}
        for expansion, cost in zip(table[symbol][1], table[symbol][2], strict=True):
            partial = {start: (math.exp(-cost), 1)}
            for part in reversed(expansion):  # they are stored last symbol first
                longer: dict[int, tuple[float, int]] = {}
                for middle, (p, ways) in partial.items():
                    for end, (q, more) in spans(part, middle).items():
                        mass, count = longer.get(end, (0.0, 0))
                        longer[end] = (mass + p * q, count + ways * more)
                partial = longer
            for end, (p, ways) in partial.items():
                mass, count = found.get(end, (0.0, 0))
                found[end] = (mass + p, count + ways)
        return found

    return spans("REVIEW", 0).get(len(words), (0.0, 0))


def test_no_text_has_two_derivations_and_its_cost_is_its_log_probability() -> None:
    rng = np.random.default_rng(0)
    tables = reviews._tables()
    for _ in range(400):
        words, nats = reviews.derive(rng)
        parses = [inside(table, words) for table in tables]
        assert sum(ways for _, ways in parses) == 1, " ".join(words)
        assert -math.log(sum(p for p, _ in parses) / len(tables)) == pytest.approx(nats)
    assert inside(tables[0], ["the", "film", "was"])[1] == 0


@pytest.mark.parametrize("domain", range(4))
def test_the_weights_of_a_rule_are_its_frequencies(domain: int) -> None:
    for symbol, (cumulative, expansions, costs) in reviews._tables()[domain].items():
        mass = [math.exp(-cost) for cost in costs]
        assert sum(mass) == pytest.approx(1)
        assert np.diff([0.0, *cumulative, 1.0]) == pytest.approx(mass)
        assert len({tuple(expansion) for expansion in expansions}) == len(expansions), symbol


# --- prompts


@pytest.mark.slow
def test_prompts_are_distinct_disjoint_and_always_the_same() -> None:
    train = reviews.prompts("train")
    test = reviews.prompts("test")
    assert (len(train), len(test)) == (1024, 256)
    assert len({*train, *test}) == 1280
    code = "from lmgym.tasks import reviews; print(hash(reviews.prompts('test')))"
    script = f"{code}\nimport sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": "0"}, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1
    assert outputs.pop().split()[1:] == ["False", "False"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_leave_the_verdict_open(split: reviews.Split) -> None:
    for prompt in reviews.prompts(split):
        assert 3 <= len(prompt.split()) <= reviews.MAX_PROMPT_TOKENS
        assert gold(prompt) == 0
        for verdict in (" good", " bad"):  # nothing in the prompt flips or stresses what follows
            assert reviews.gold([prompt], [verdict]) == reviews.gold(["although" * ("although" in prompt)], [verdict])


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"`split` must be one of .*train.*test.*, got 'valid'"):
        reviews.prompts("valid")  # type: ignore[arg-type]


def test_continuations_of_prompts_fit_the_horizon() -> None:
    lengths = [length for _, length, _ in continuations(20_000)]
    assert np.mean(np.array(lengths) <= reviews.MAX_NEW_TOKENS) > 0.97
    assert 10 < np.mean(lengths) < 16


@pytest.mark.slow
def test_prompts_do_not_decide_the_sentiment() -> None:
    scores = defaultdict(list)
    for prompt, _, score in continuations(40_000):
        scores[prompt].append(score)
    frequent = [np.array(found) for found in scores.values() if len(found) >= 100]
    assert len(frequent) > 40
    for found in frequent:
        assert abs(found.mean()) < 4.5 * found.std() / math.sqrt(len(found))
        assert found.std() > 0.7


def continuations(size: int) -> list[tuple[str, int, float]]:
    """Prompts cut from reviews as the task cuts them, with the tokens that follow (EOS included) and the gold score."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(size):
        words = reviews.sample_review(rng).split()
        cut = reviews.sample_cut(words, rng)
        found.append((" ".join(words[:cut]), len(words) - cut + 1, reviews.sentiment(" ".join(words))))
    return found


# --- the gold score


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ("the film was bad .", "the film was good ."),
        ("the film was slightly good .", "the film was good ."),
        ("the film was good .", "the film was very good ."),
        ("the film was very good .", "the film was extremely superb ."),
        ("the film was very bad .", "the film was bad ."),
        ("the film was not good .", "the film was not bad ."),
        ("the film was bad .", "the film was not good ."),  # negation flips, and damps
        ("the film was not bad .", "the film was good ."),
        ("the film was not very good .", "the film was slightly good ."),
        ("the film was good but the jokes were bad .", "the film was bad but the jokes were good ."),
        ("the film was good but the jokes were bad .", "the film was good and the jokes were bad ."),
        ("although the film was good , the jokes were bad .", "although the film was bad , the jokes were good ."),
        ("i did not enjoy the soup .", "i enjoyed the soup ."),
        ("i enjoyed the soup .", "i truly enjoyed the soup and the steak was delicious ."),
        ("it was no masterpiece .", "it was no disaster ."),
        ("the room was spotless and the bed was dirty .", "the room was spotless and the bed was comfortable ."),
        ("the room was clean .", "the room was clean and the bed was spotless ."),
    ],
)
def test_gold_orders_hand_written_reviews(worse: str, better: str) -> None:
    assert gold(worse) < gold(better)


@pytest.mark.parametrize("word", ["good", "great", "superb"])
def test_negation_flips_the_sign(word: str) -> None:
    for negation in ("not", "never", "hardly", "not a very", "not so"):
        assert gold(f"it was {negation} {word}") < 0 < gold(f"it was very {word}")
    assert gold(f"it was not not {word}") > 0
    assert gold(f"it was not , but {word}") > 0  # a mark ends its reach
    assert gold(f"not that the place where we sat was {word}") > 0  # and so do three words


def test_good_and_bad_reviews_mirror_each_other() -> None:
    mirror = str.maketrans({"G": "B", "B": "G"})
    swap = {"G": "good", "B": "bad"}
    for pattern in ("very G .", "not G but B .", "although it was B , it was so G .", "G , not B and G . not B ."):
        here, there = (" ".join(swap.get(w, w) for w in p.split()) for p in (pattern, pattern.translate(mirror)))
        assert gold(here) == pytest.approx(-gold(there))


def test_gold_is_unit_free_on_the_corpus() -> None:
    scores = np.array(reviews.gold(CORPUS, [""] * len(CORPUS)))
    assert abs(scores.mean()) < 0.06
    assert scores.std() == pytest.approx(1, abs=0.05)
    assert np.abs(scores).max() < 3


@pytest.mark.parametrize(
    "spam",
    [
        "superb " * 24,
        "superb , " * 12,
        "superb . " * 12,
        "but superb " * 12,
        "very superb " * 12,
        "not not " * 11 + "superb",
    ],
)
def test_repeating_a_word_does_not_beat_an_honest_review(spam: str) -> None:
    honest = "the film was really gripping , the songs were very lovely and we truly loved the cast ."
    assert gold(spam) < gold(honest)
    assert gold("superb superb superb") == gold("superb")
    assert gold("very very very superb") == gold("very superb")


def test_piling_up_different_words_is_bounded() -> None:
    good = [word for word in reviews.words() if gold(word) > 0]
    assert reviews.sentiment(" , ".join(f"extremely {word}" for word in good * 20)) < 3


@pytest.mark.parametrize(
    "text",
    ["", " ", "<eos> <pad>", "zzz 💥 \n\t", ". . , , but", "not", "very", "although", "but not very", "the and of"],
)
def test_texts_without_an_opinion_are_neutral(text: str) -> None:
    assert gold(text) == 0


def test_gold_is_total_on_token_salad() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [*reviews.words(), "<unk>", ""]
    salad = [" ".join(rng.choice(vocabulary, size=rng.integers(0, 60))) for _ in range(500)]
    scores = reviews.gold(salad, salad[::-1], prompt_ids=[[]] * 500)
    assert all(isinstance(score, float) and -3 < score < 3 for score in scores)
    assert gold(f"{salad[1]} <eos>") == gold(salad[1])


def test_gold_is_fast() -> None:
    started = time.process_time()
    reviews.gold(CORPUS, [""] * len(CORPUS))
    assert (time.process_time() - started) / len(CORPUS) < 100e-6  # about 4 us on an idle machine


def test_gold_demands_one_completion_a_prompt() -> None:
    with pytest.raises(ValueError, match="zip"):
        reviews.gold(["a", "b"], [" c"])
