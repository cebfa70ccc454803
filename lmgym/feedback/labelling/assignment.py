"""An item that an annotator is asked about, with the answer; as a row of the database, and as records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmgym.feedback.json_form import judgement_from_json, record_from_json
from lmgym.feedback.labelling.answers import skip_of
from lmgym.feedback.records import Judgement, Record

LABELLING = "labelling"  # the column of an exported record that says how it was asked

SELECT = (
    "SELECT a.id, a.annotator, i.record, i.key, a.shown, a.chosen_by, a.verdict, a.judgements, a.seconds, a.time"
    " FROM assignments a JOIN items i ON i.id = a.item"
)


@dataclass(frozen=True)
class Assignment:
    """An item that an annotator is asked about, and the answer where there is one.

    Attributes:
        id: of the assignment. annotator: who. item: the record, without a judgement. key: its id.
        shown: indices of its responses in the order in which they are shown.
        chosen_by: "random" or "disagreement"; "gold" where the answer is known, "repeat" where it was asked before.
        verdict: "judged", "cannot_say" or "skip"; None while there is no answer.
        judgements: what was said. seconds: that it took. time: when.
    """

    id: int
    annotator: str
    item: Record
    key: str
    shown: tuple[int, ...]
    chosen_by: str
    verdict: str | None = None
    judgements: tuple[Judgement, ...] = ()
    seconds: float | None = None
    time: str | None = None


def read_assignment(row: Sequence[Any]) -> Assignment:
    """The assignment of a row that `SELECT` gives."""
    item = replace(record_from_json(json.loads(row[2])), judgement=None)
    judgements = () if row[7] is None else read_judgements(row[7])
    return Assignment(
        row[0], row[1], item, row[3], tuple(json.loads(row[4])), row[5], row[6], judgements, row[8], row[9]
    )


def read_judgements(text: str) -> tuple[Judgement, ...]:
    """The judgements in a row of answers."""
    return tuple(judgement_from_json(judgement) for judgement in json.loads(text))


def to_records(answer: Assignment, store: str) -> Iterator[Record]:
    """A record for each judgement of an answer."""
    judgements = answer.judgements or (skip_of(answer.verdict or "skip"),)
    names = [judgement.kind for judgement in judgements]
    for position, judgement in enumerate(judgements):
        suffix = f"-{names[:position].count(judgement.kind) + 1}" if names.count(judgement.kind) > 1 else ""
        yield replace(
            answer.item,
            judgement=judgement,
            id=f"{store}-{answer.id}-{judgement.kind}{suffix}",
            annotator=answer.annotator,
            time=answer.time,
            seconds=answer.seconds,
            order_shown=answer.shown,
            columns={**answer.item.columns, LABELLING: {"item": answer.key, "chosen_by": answer.chosen_by}},
        )
