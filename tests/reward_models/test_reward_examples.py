"""What a reward model reads of each kind of judgement, and of files in other layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reward_texts import WORDS, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.records import Choice, Completion, Correction, Ranking, Ratings, Record, Skip, Votes
from lmgym.reward_models.examples import Example, encode_texts, read_examples

TOKENIZER = make_tokenizer()
ONE_ALONE = Ratings((4.0,), 0, 4)
TEXTS = (" good", " bad", " fine", " dull")


def read(judgement: Any, texts: tuple[Any, ...] = TEXTS) -> Example:
    (example,) = read_examples([Record("the film was", texts, judgement)], TOKENIZER, None).examples
    return example


def texts_of(example: Example) -> list[str]:
    return [str(completion.text) for completion in example.record.completions]


@pytest.mark.parametrize(
    ("judgement", "texts", "tiers", "strengths", "ratings"),
    [
        (Ranking(((2,), (0, 3), (1,))), TEXTS, ((2,), (0, 3), (1,)), (0.0,) * 6, None),
        (Ranking(((3,), (1,))), (" bad", " dull"), ((1,), (0,)), (0.0,), None),
        (Choice(3, 1, 2.5), (" bad", " dull"), ((1,), (0,)), (2.5,), None),
        (Choice(1, 3, 0.0), (" bad", " dull"), ((0, 1),), (0.0,), None),
        (Choice(1, 3), (" bad", " dull"), ((0,), (1,)), (0.0,), None),
        (
            Ratings((5.0, 1.0, None, 3.0), 1, 5),
            (" good", " bad", " dull"),
            ((0,), (2,), (1,)),
            (2.0, 4.0, 2.0),
            (1.0, 0.0, 0.5),
        ),
        (Ratings((2.0, None, None, 2.0), 0, 4), (" good", " dull"), ((0, 1),), (0.0,), (0.5, 0.5)),
        (ONE_ALONE, (" bad",), (), (), (1.0,)),
        (
            Votes((0, 7, -2, 3), accepted=0),
            TEXTS,
            ((1,), (3,), (0,), (2,)),
            (1.0, 2.0, 4.0, 1.0, 3.0, 2.0),
            (1.0, 3.0, -1.0, 2.0),
        ),
        (Correction(1, " fine ."), (" bad", " fine .<eos>"), ((1,), (0,)), (0.0,), None),
    ],
)
def test_every_judgement_is_read(judgement: Any, texts: Any, tiers: Any, strengths: Any, ratings: Any) -> None:
    example = read(judgement, (" bad",)) if judgement == ONE_ALONE else read(judgement)
    assert texts_of(example) == list(texts)
    assert tuple(map(tuple, example.tiers)) == tiers
    assert example.strengths == pytest.approx(strengths)
    assert example.ratings == ratings
    assert example.kind == judgement.kind
    assert [len(ids) for ids in example.sequences] == [3 + len(t.replace("<eos>", " <eos>").split()) for t in texts]


def test_what_says_nothing_is_left_out_and_counted() -> None:
    records = [
        Record("the film was", TEXTS),
        Record("the film was", TEXTS, Skip("no idea")),
        Record("the film was", TEXTS, Correction(0, " good")),
        Record("the film was", TEXTS, Choice(0, 1)),
    ]
    read = read_examples(records, TOKENIZER, None)
    assert read.records == 4
    assert [example.kind for example in read.examples] == ["choice"]


def test_a_complete_response_ends_with_the_eos_and_one_that_was_cut_does_not() -> None:
    ended, cut, silent = read(
        Ranking.of_order([0, 1, 2]),
        (Completion(" good .", ended=True), Completion(" bad . <eos>", ended=False), Completion(" fine .")),
    ).sequences
    assert ended[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.eos_token_id not in cut
    assert TOKENIZER.eos_token_id not in silent


def test_special_tokens_that_a_tokenizer_adds_stand_once() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    good = len(["<pad>", "<eos>", "<unk>"]) + WORDS.index("good")
    for text in ("good", "good <eos>", "<unk> good"):
        assert encode_texts(tokenizer, [text]) == [[2, good, 1]]


def test_rows_of_trl_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "the film was", "chosen": " good .", "rejected": " bad .", "margin": 3}
    path.write_text(json.dumps(row) + "\n")
    (example,) = read_examples(str(path), TOKENIZER, None).examples
    assert example.tiers == ((0,), (1,))
    assert example.strengths == (3.0,)
    assert [ids[-1] for ids in example.sequences] == [TOKENIZER.eos_token_id] * 2


def test_a_text_that_is_too_long_is_named() -> None:
    long = Record("the film was", (" good" * 9, " bad"), Choice(0, 1))
    with pytest.raises(InvalidArgumentError, match="^Record 1 of `preferences`: .* 1 to 8 tokens together, .* got 12"):
        read_examples([long], TOKENIZER, 8)


def test_a_text_that_the_tokenizer_does_not_know_is_named() -> None:
    backend = Tokenizer(models.WordLevel({"the": 0, "film": 1}))  # without a token for other words
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    strict = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(InvalidArgumentError, match="`preferences` must have texts .* got 'the film soup': "):
        read_examples([Record("the film", (" the", " soup"), Choice(0, 1))], strict, None)
