"""Records as rows in the layouts of other people, above all TRL, and what of them those cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.comparisons import Pair, demonstrations_of, pairs_of, ranked
from lmgym.feedback.json_form import record_to_json, text_to_json
from lmgym.feedback.layouts import (
    COMPLETION_FIELDS,
    RECORD_FIELDS,
    RESERVED,
    fills_field,
    share_record,
    split_prompt,
)
from lmgym.feedback.records import Completion, Correction, Message, Ranking, Ratings, Record, Skip, Text, Votes

Row = dict[str, Any]


class Loss(NamedTuple):
    """Something that a layout cannot hold: of how many records, and which is the first."""

    records: int
    first: int

    def __str__(self) -> str:
        return f"record {self.first}" if self.records == 1 else f"{self.records:,} records from record {self.first} on"


@dataclass
class Losses:
    """What a layout cannot hold of the records that were written.

    Attributes:
        found: by what is lost. record: number of the record that is being written. labelled: what the rows with a
            label before it had in common.
    """

    found: dict[str, Loss] = field(default_factory=dict)
    record: int = 0
    labelled: Row | None = None

    def add(self, what: str) -> None:
        """Notes something of the record that is being written."""
        known = self.found.get(what, Loss(0, self.record))
        self.found[what] = known._replace(records=known.records + 1)

    def __str__(self) -> str:
        return "; ".join(f"{what} ({loss})" for what, loss in self.found.items())


@dataclass(frozen=True)
class Style:
    """How texts are written.

    Attributes:
        chat: texts become conversations, the prompt the user's message and a completion the assistant's.
        implicit: there is no column for the prompt: both sides begin with it.
        table: every row has the same columns, so that a completion has to say that it is complete.
    """

    chat: bool = False
    implicit: bool = False
    table: bool = False


def rows_of(record: Record, layout: str, style: Style, losses: Losses) -> Iterator[Row]:
    """The rows of a record in a layout; notes what they leave out.

    Args:
        record: what is written. layout: one of `LAYOUTS`. style: of its texts.
        losses: where to note.
    """
    losses.record += 1
    yield from LAYOUTS[layout](record, style, losses)


def _record_rows(record: Record, _: Style, __: Losses) -> Iterator[Row]:
    yield record_to_json(record)


# -- pairs -----------------------------------------------------------------------------------------------------------


def _pair_rows(record: Record, style: Style, losses: Losses) -> Iterator[Row]:
    pairs = pairs_of(record)
    order = ranked(record)
    _note_pair_losses(record, pairs, losses)
    if order is None:
        return
    written = [pair for pair in pairs if not pair.tie]
    for number, pair in enumerate(written):
        better = order.completions[pair.better]
        worse = order.completions[pair.worse]
        row = _pair_texts(record.prompt, better, worse, style, losses)
        for side, completion in (("chosen", better), ("rejected", worse)):
            row |= _completion_columns(side, completion, style)
        if pair.strength is not None:
            row["margin"] = pair.strength
        row = _with_record_columns(row, record, losses)
        if len(written) > 1 and record.id is not None:
            row["id"] = f"{record.id}/{number}"
        if record.order_shown is not None:
            sides = {pair.better: 0, pair.worse: 1}
            row["order_shown"] = [sides[index] for index in record.order_shown if index in sides]
        yield row


def _note_pair_losses(record: Record, pairs: list[Pair], losses: Losses) -> None:
    judgement = record.judgement
    if judgement is None:
        losses.add("records that nobody has judged")
    elif isinstance(judgement, Skip):
        losses.add("records whose annotator could not say")
    elif not pairs:
        losses.add("records that prefer nothing")
    if any(pair.tie for pair in pairs):
        losses.add("ties")
    if len(pairs) > 1:
        losses.add("that several pairs are one judgement")
    if isinstance(judgement, Ratings | Votes) and pairs:
        losses.add(f"the {judgement.kind}, of which the order and the differences stay")
    if isinstance(judgement, Correction) and pairs:
        losses.add("that the better text is an edit of the other")
    compared = {index for pair in pairs for index in (pair.better, pair.worse)}
    if pairs and not set(range(len(record.completions))) <= compared:
        losses.add("completions that are in no pair")


def _pair_texts(prompt: Text, better: Completion, worse: Completion, style: Style, losses: Losses) -> Row:
    asked, chosen, rejected = (_styled(text, role, style) for text, role in _roles(prompt, better, worse))
    if not style.implicit:
        return {"prompt": text_to_json(asked), "chosen": text_to_json(chosen), "rejected": text_to_json(rejected)}
    row = {"chosen": text_to_json(asked + chosen), "rejected": text_to_json(asked + rejected)}
    try:
        found: Any = split_prompt(None, **row)[0]
    except InvalidArgumentError:
        found = None
    if found != asked:
        losses.add("where the prompt ends, in texts that go on alike")
    return row


def _roles(prompt: Text, *completions: Completion) -> list[tuple[Text, str]]:
    return [(prompt, "user"), *((completion.text, "assistant") for completion in completions)]


def _styled(text: Text, role: str, style: Style) -> Any:
    return (Message(role, text),) if style.chat and isinstance(text, str) else text


# -- labels and demonstrations ---------------------------------------------------------------------------------------


def _label_rows(record: Record, style: Style, losses: Losses) -> Iterator[Row]:
    judgement = record.judgement
    labels: Mapping[int, float | None]
    if isinstance(judgement, Ratings) and (judgement.low, judgement.high) == (0, 1):
        labels = dict(enumerate(judgement.values))
        if any(value is None for value in judgement.values):
            losses.add("completions without a rating")
        if any(value not in (0, 1, None) for value in judgement.values):
            losses.add("ratings between 0 and 1, which are rounded")
    else:
        labels = _labels_of_order(record)
        losses.add("records that do not rate every completion as 0 or 1, of which the best and the worst stay")
    completions = _all_completions(record)
    rows = [
        _label_row(record, completions[index], value >= 0.5, style, losses)
        for index, value in labels.items()
        if value is not None
    ]
    if rows and losses.labelled is not None and share_record(rows[0], losses.labelled):
        losses.add("that neighbours with one prompt are several judgements")
    if rows:
        losses.labelled = rows[0]
    yield from rows


def _label_row(record: Record, completion: Completion, label: bool, style: Style, losses: Losses) -> Row:
    (asked, _), (text, role) = _roles(record.prompt, completion)
    row: Row = {"prompt": text_to_json(_styled(asked, "user", style))}
    row["completion"] = text_to_json(_styled(text, role, style))
    row["label"] = label
    row = _with_record_columns(row | _completion_columns("completion", completion, style), record, losses)
    if record.order_shown is not None:
        row["order_shown"] = list(record.order_shown)
    return row


def _all_completions(record: Record) -> tuple[Completion, ...]:
    order = ranked(record)
    return record.completions if order is None else order.completions


def _labels_of_order(record: Record) -> dict[int, float]:
    """1 for the best tier and 0 for the worst."""
    order = ranked(record)
    if order is None or not isinstance(order.judgement, Ranking) or len(order.judgement.tiers) < 2:
        return {}
    tiers = order.judgement.tiers
    return dict.fromkeys(tiers[0], 1.0) | dict.fromkeys(tiers[-1], 0.0)


def _demonstration_rows(record: Record, style: Style, losses: Losses) -> Iterator[Row]:
    losses.add("all but the texts that are to be imitated")
    for completion in demonstrations_of(record):
        (asked, _), (text, role) = _roles(record.prompt, completion)
        row = {"prompt": text_to_json(_styled(asked, "user", style))}
        row["completion"] = text_to_json(_styled(text, role, style))
        yield row | _completion_columns("completion", completion, style)


# -- what else is in a record ----------------------------------------------------------------------------------------


def _completion_columns(side: str, completion: Completion, style: Style) -> Row:
    """What is known of a completion, under `chosen_policy` and so on; that it is complete goes without saying."""
    known = {name: getattr(completion, name) for name in COMPLETION_FIELDS[:-1]}
    row = {f"{side}_{name}": value for name, value in known.items() if value is not None}
    if style.table or completion.ended is not True:
        row[f"{side}_ended"] = completion.ended
    return row


def _with_record_columns(row: Row, record: Record, losses: Losses) -> Row:
    """A row with the record's own fields and its columns, where their names are free."""
    for name in RECORD_FIELDS:
        value = getattr(record, name)
        if value is not None and name != "order_shown":
            row[name] = value
    for name, value in record.columns.items():
        if name in row or name in RESERVED or fills_field(name, value):
            losses.add(f"the column {name!r}, whose name the layout needs")
        else:
            row[name] = value
    return row


LAYOUTS: dict[str, Callable[[Record, Style, Losses], Iterator[Row]]] = {
    "records": _record_rows,
    "pairs": _pair_rows,
    "labels": _label_rows,
    "demonstrations": _demonstration_rows,
}
