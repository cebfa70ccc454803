"""The record of feedback: its judgements, its checks, its JSON, and what learning reads in it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from lmgym.errors import LmGymError
from lmgym.feedback.comparisons import Pair, demonstrations_of, pairs_of, ranked
from lmgym.feedback.json_form import record_from_json, record_to_json
from lmgym.feedback.records import (
    Choice,
    Completion,
    Correction,
    Judgement,
    Message,
    Ranking,
    Ratings,
    Record,
    Skip,
    Votes,
    now,
)

HARD_TEXTS = (" leading", "CR\r\nLF\n", "e\u0301 💥", "שלום \u202eabc", "zero\u200bwidth\ufeff", "\u2028\x00\t", "")
JUDGEMENTS: tuple[Judgement, ...] = (
    Ranking(((2,), (0, 1))),
    Ratings((1, None, 4.5), 1, 5),
    Choice(1, 2, strength=2),
    Choice(0, 2, strength=0),
    Correction(1, " edited"),
    Votes((-3, 0, 14), accepted=1),
    Skip("they are the same"),
)
CHAT = (Message("system", "be kind"), Message("user", "hi"))


def record(judgement: Judgement | None = None, k: int = 3, **fields: Any) -> Record:
    return Record("the film was", tuple(f" {i}" for i in range(k)), judgement, **fields)


@pytest.mark.parametrize("judgement", [*JUDGEMENTS, None])
def test_a_record_survives_json(judgement: Judgement | None) -> None:
    completions = (Completion(HARD_TEXTS[0], "ppo", "temperature=0.7", -3.25, True), *HARD_TEXTS[1:3])
    whole = Record(
        HARD_TEXTS[4], completions, judgement, "a1", "Zoë", now(), 3.5, (2, 0, 1), {"task": "reviews", "n": [1, None]}
    )
    assert record_from_json(json.loads(json.dumps(record_to_json(whole)))) == whole
    chat = Record(CHAT, tuple((Message("assistant", text),) for text in HARD_TEXTS), None)
    assert record_from_json(json.loads(json.dumps(record_to_json(chat)))) == chat


def test_texts_alone_stand_in_json_as_they_are() -> None:
    assert record_to_json(record(Ranking(((1,), (0,))), 2)) == {
        "prompt": "the film was",
        "completions": [" 0", " 1"],
        "judgement": {"kind": "ranking", "tiers": ((1,), (0,))},
    }


def test_arrays_become_plain_integers() -> None:
    made = record(Ranking.of_order(np.array([2, 0, 1])), order_shown=np.array([1, 0, 2]))
    assert made == record(Ranking(((2,), (0,), (1,))), order_shown=(1, 0, 2))
    json.dumps(record_to_json(made))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 3}, "`prompt` must be a str or a list of messages, got 3."),
        ({"prompt": "\ud800"}, "`prompt` must be Unicode"),
        ({"prompt": [{"role": "user"}]}, r"`prompt\[0\]` must be a message of a role and a content"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "must be texts where `prompt` is a text, and messages"),
        ({"completions": ["a"]}, "`completions` must hold at least 2 completions, got 1."),
        ({"completions": "ab"}, "`completions` must be a list, got 'ab'."),
        ({"completions": ["a", None]}, r"`completions\[1\]`: `text` must be a str"),
        ({"completions": ["a", {"text": "b", "log_prob": math.nan}]}, r"`completions\[1\]`: `log_prob` must be a fin"),
        ({"completions": ["a", {"text": "b", "polcy": "x"}]}, r"`completions\[1\]`: .* Did you mean 'policy'?"),
        ({"judgement": 3}, '`judgement` must be an object with a "kind", got 3.'),
        ({"judgement": {"kind": "rankings"}}, "`judgement.kind` must be one of .* Did you mean 'ranking'?"),
        ({"judgement": {"kind": "ranking"}}, r"a ranking must have \['tiers'\]"),
        ({"judgement": {"kind": "ranking", "tiers": [[0], [5]]}}, r"`tiers\[1\]` must be the index of one of 2 compl"),
        ({"judgement": {"kind": "ranking", "tiers": [[0], [-1]]}}, r"`tiers\[1\]\[0\]` must be the index of a compl"),
        ({"judgement": {"kind": "ranking", "tiers": [[0], [0]]}}, "`tiers` must be groups of indices of at least two"),
        ({"judgement": {"kind": "ranking", "tiers": [[0], []]}}, "`tiers` must be groups of indices of at least two"),
        ({"judgement": {"kind": "ranking", "tiers": [[0], [1.0]]}}, r"`tiers\[1\]\[0\]` must be the index"),
        ({"judgement": {"kind": "ranking", "tiers": [0, 1]}}, r"`tiers\[0\]` must be a list, got 0."),
        ({"judgement": {"kind": "ratings", "values": [1, math.nan], "low": 1, "high": 5}}, r"`values\[1\]` must be a"),
        ({"judgement": {"kind": "ratings", "values": [1, 6], "low": 1, "high": 5}}, ">= 1 and <= 5, got 6."),
        ({"judgement": {"kind": "ratings", "values": [1], "low": 1, "high": 5}}, "must have one entry a completion, 2"),
        ({"judgement": {"kind": "ratings", "values": [1, 1], "low": 1, "high": 1}}, "`high` must be a finite number >"),
        ({"judgement": {"kind": "ratings", "values": [None, None], "low": 1, "high": 2}}, "must rate a completion"),
        ({"judgement": {"kind": "choice", "preferred": 1, "other": 1}}, "must be two completions, got 1 twice."),
        ({"judgement": {"kind": "choice", "preferred": True, "other": 0}}, "`preferred` must be the index"),
        ({"judgement": {"kind": "choice", "preferred": 1, "other": 0, "strength": -1}}, "`strength` must be a finite"),
        ({"judgement": {"kind": "correction", "index": 2, "text": "c"}}, "`index` must be the index of one of 2"),
        ({"judgement": {"kind": "votes", "counts": [1, 2.5]}}, r"`counts\[1\]` must be an int, got 2.5."),
        ({"judgement": {"kind": "votes", "counts": [1, 2], "accepted": 2}}, "`accepted` must be the index of one of"),
        ({"judgement": {"kind": "skip", "reason": 3}}, "`reason` must be a str, got 3."),
        ({"judgment": None}, "`field of a record` must be one of .* Did you mean 'judgement'. Anything of your own"),
        ({"annotator": 3}, "`annotator` must be a str, got 3."),
        ({"time": "2026-11-27T03:40:00+01:00"}, "`time` must be a time of ISO 8601 in UTC"),
        ({"time": "yesterday"}, "`time` must be a time of ISO 8601 in UTC"),
        ({"seconds": -1}, "`seconds` must be a finite number >= 0"),
        ({"order_shown": [0, 0]}, r"`order_shown` must have each completion once at most, got \[0, 0\]."),
        ({"order_shown": [0, 2]}, "`order_shown` must be the index of one of 2 completions"),
        ({"columns": {"score": math.inf}}, r"`columns\['score'\]` must be a value that JSON has, got inf."),
        ({"columns": [1]}, r"`columns` must be a dict, got \[1\]."),
    ],
)
def test_a_field_that_cannot_be_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        record_from_json({"prompt": "p", "completions": ["a", "b"], **fields})


def test_one_completion_is_enough_to_rate_or_correct() -> None:
    for judgement in (Ratings((1,), 0, 1), Correction(0, "b"), Skip()):
        assert not pairs_of(record(judgement, k=1)) or judgement.kind == "correction"
    with pytest.raises(LmGymError, match="at least 2 completions, got 1"):
        record(Ranking(((0,), (1,))), k=1)


def test_votes_follow_the_rule_of_stackllama() -> None:
    assert Votes((-1, 0, 1, 2, 3, 10, 1000), accepted=2).scores() == (-1, 0, 2, 2, 2, 3, 10)
    assert Votes((-1, 0), accepted=0).scores() == (-1, 0)


@pytest.mark.parametrize(
    ("judgement", "pairs"),
    [
        (Ranking(((2,), (0, 1))), [Pair(2, 0), Pair(2, 1), Pair(0, 1, True, 0.0)]),
        (Ranking(((1,), (0,))), [Pair(1, 0)]),
        (Ratings((1, None, 4.5), 1, 5), [Pair(2, 0, False, 3.5)]),
        (Ratings((2, 2, 2), 1, 5), [Pair(0, 1, True, 0.0), Pair(0, 2, True, 0.0), Pair(1, 2, True, 0.0)]),
        (Choice(1, 2, strength=2), [Pair(1, 2, False, 2)]),
        (Choice(1, 2), [Pair(1, 2)]),
        (Choice(0, 2, strength=0), [Pair(0, 2, True, 0.0)]),
        (Correction(1, " edited"), [Pair(3, 1)]),
        (Correction(1, " 1"), []),
        (Votes((-3, 0, 14)), [Pair(2, 1, False, 4), Pair(2, 0, False, 5), Pair(1, 0, False, 1)]),
        (Ratings((None, None, 3), 1, 5), []),
        (Skip(), []),
        (None, []),
    ],
)
def test_every_judgement_gives_pairs(judgement: Judgement | None, pairs: list[Pair]) -> None:
    assert pairs_of(record(judgement)) == pairs


def test_a_correction_is_a_demonstration_and_better_than_what_was_edited() -> None:
    corrected = record(Correction(1, " edited"), annotator="ann")
    order = ranked(corrected)
    assert order is not None
    assert order.completions[3] == Completion(" edited", policy="ann", ended=True)
    assert order.judgement == Ranking(((3,), (1,)))
    assert demonstrations_of(corrected) == [order.completions[3]]
    assert demonstrations_of(record(Correction(1, " 1"))) == [Completion(" 1", ended=True)]


def test_the_best_tier_is_what_to_imitate() -> None:
    assert [c.text for c in demonstrations_of(record(Ranking(((2, 0), (1,)))))] == [" 2", " 0"]
    for judgement in (Ranking(((2, 0),)), Choice(0, 1, strength=0), Ratings((1, None, None), 0, 1), Skip(), None):
        assert not demonstrations_of(record(judgement))


def test_records_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; sys.modules['lmgym'] = type(sys)('lmgym'); sys.modules['lmgym'].__path__ = ['lmgym'];"
        "import lmgym.feedback.json_form, lmgym.feedback.comparisons; print({'torch', 'numpy'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
