"""Rows as other people lay them out, above all TRL, as records: pairs, with or without a prompt, and labels.

    {"prompt": ..., "chosen": ..., "rejected": ...}     a choice; the prompt may also be what both sides begin with
    {"prompt": ..., "completion": ..., "label": true}   a rating of 1 or 0; neighbours of one prompt share a record
    {"prompt": ..., "completions": [...], "ranking": [2, 0, 1]}   indices of the completions, best first

Texts may be conversations. What such a row holds beyond that fills the record's fields where it fits them, and goes
into `columns` where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmgym.data.conversations import is_conversation
from lmgym.errors import InvalidArgumentError, shorten
from lmgym.feedback.fields import check_sequence, check_text
from lmgym.feedback.json_form import as_columns, judgement_to_json, record_from_json
from lmgym.feedback.records import Choice, Completion, Ranking, Ratings, Record, is_time
from lmgym.models.texts import common_length

PAIR = ("chosen", "rejected")
LABEL = ("completion", "label")
RESERVED = ("prompt", "completions", *PAIR, *LABEL)  # names of columns that say what the layout is
COMPLETION_FIELDS = ("policy", "sampler", "log_prob", "ended")
RECORD_FIELDS = ("id", "annotator", "time", "seconds", "order_shown")


def is_finite(value: object) -> bool:
    """Whether a value is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_FITS: dict[str, Callable[[Any], bool]] = {
    "id": _is_text,
    "annotator": _is_text,
    "time": is_time,
    "seconds": lambda value: is_finite(value) and value >= 0,
    "order_shown": lambda value: isinstance(value, list) and all(type(index) is int for index in value),
    "policy": _is_text,
    "sampler": _is_text,
    "log_prob": is_finite,
    "ended": lambda value: isinstance(value, bool),
    "margin": lambda value: is_finite(value) and value > 0,
}


def is_record(row: object) -> bool:
    """Whether a row is meant as a record of feedback, in any layout."""
    if isinstance(row, Record):
        return True
    return isinstance(row, Mapping) and ("completions" in row or set(PAIR) <= row.keys() or set(LABEL) <= row.keys())


def record_from_row(row: object) -> Record:
    """The record of a row of lmgym's own form, or of a pair; a record is its own.

    Raises:
        LmGymError: naming what is wrong with it.
    """
    if isinstance(row, Record):
        return row
    if not isinstance(row, Mapping):
        raise InvalidArgumentError(f"must be an object with named fields, got {shorten(row)}.")
    if "completions" not in row and set(PAIR) <= row.keys():
        return _record_from_pair(row)
    if "completions" not in row:
        raise InvalidArgumentError(
            f"must have 'prompt' and 'completions', or {list(PAIR)}, or 'prompt' and {list(LABEL)}, got an object with "
            f"{list(row)}."
        )
    if "ranking" in row and "judgement" not in row:
        return _record_from_ranking(row)
    return record_from_json(row)


def _record_from_ranking(row: Mapping[str, Any]) -> Record:
    """A row of texts and their order; what else it holds fills the fields that it fits."""
    columns = dict(row)
    order = check_sequence("ranking", columns.pop("ranking"))
    fields = {name: columns.pop(name) for name in ("prompt", "completions", "columns") if name in row}
    fields |= {name: _take(columns, name, name) for name in RECORD_FIELDS}
    fields["judgement"] = judgement_to_json(Ranking.of_order(order))
    if columns:
        fields["columns"] = {**as_columns(fields.get("columns")), **columns}
    return record_from_json(fields)


def _record_from_pair(row: Mapping[str, Any]) -> Record:
    columns = dict(row)
    asked = columns.pop("prompt", None)
    prompt, *texts = split_prompt(asked, *(columns.pop(side) for side in PAIR))
    if isinstance(asked, str) and not isinstance(prompt, str) and prompt[-1].content != asked:
        columns["prompt_text"] = asked
    strength = _take(columns, "margin", "margin")
    completions = tuple(_take_completion(columns, side, text) for side, text in zip(PAIR, texts, strict=True))
    fields = {name: _take(columns, name, name) for name in RECORD_FIELDS}
    return Record(prompt, completions, Choice(0, 1, strength), columns=columns, **fields)


def split_prompt(prompt: object, chosen: object, rejected: object) -> tuple[Any, Any, Any]:
    """Prompt and completions of a pair, whose prompt may be what both sides begin with.

    Raises:
        InvalidArgumentError: where there is no prompt, or a side has no answer to it.
    """
    if is_conversation(chosen) and is_conversation(rejected):
        return _split_conversations(prompt, check_text("chosen", chosen), check_text("rejected", rejected))
    if prompt is not None:
        return prompt, chosen, rejected
    start = common_start(chosen, rejected) if isinstance(chosen, str) and isinstance(rejected, str) else 0
    if start == 0:
        raise InvalidArgumentError(
            f"`chosen` and `rejected` must begin with a prompt where there is no 'prompt', got {shorten(chosen)} and "
            f"{shorten(rejected)}."
        )
    return chosen[:start], chosen[start:], rejected[start:]  # type: ignore[index]


def common_start(chosen: str, rejected: str) -> int:
    """Characters that both texts begin with; a space before the first difference belongs to the answers, as in TRL."""
    start = common_length(chosen, rejected)
    return start - 1 if start and chosen[start - 1] == " " else start


def _split_conversations(prompt: object, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The same of messages, which may have the prompt in front."""
    if is_conversation(prompt):
        asked = check_text("prompt", prompt)
        start = len(asked) if chosen[: len(asked)] == rejected[: len(asked)] == asked else 0
    else:
        start = common_length(chosen, rejected)
        asked = chosen[:start]
    if not asked or len(chosen) == start or len(rejected) == start:
        raise InvalidArgumentError(
            f"`chosen` and `rejected` must share a question and have an answer each, got {shorten(chosen)} and "
            f"{shorten(rejected)}."
        )
    return asked, chosen[start:], rejected[start:]


# -- labels ----------------------------------------------------------------------------------------------------------


def is_labelled(row: object) -> bool:
    """Whether a row is a completion with a label."""
    if not isinstance(row, Mapping) or "completions" in row or set(PAIR) <= row.keys():
        return False
    return set(LABEL) <= row.keys()


def share_record(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two neighbouring rows with a label are of one record: all that is not of the completion is equal."""
    return _of_record(row) == _of_record(other)


def _of_record(row: Mapping[str, Any]) -> dict[str, Any]:
    own = ("completion", "label", *(f"completion_{name}" for name in COMPLETION_FIELDS))
    return {name: value for name, value in row.items() if name not in own}


def record_from_labels(rows: Sequence[Mapping[str, Any]]) -> Record:
    """The record of rows that share one: ratings of 0 and 1.

    Raises:
        LmGymError: naming what is wrong with them.
    """
    completions = []
    labels = []
    columns: dict[str, Any] = {}
    for row in rows:
        columns = dict(row)
        label = columns.pop("label")
        if not isinstance(label, int) or label not in (0, 1):
            raise InvalidArgumentError(f"`label` must be true or false, got {shorten(label)}.")
        labels.append(int(label))
        completions.append(_take_completion(columns, "completion", columns.pop("completion")))
    if "prompt" not in columns:
        raise InvalidArgumentError(f"must have a 'prompt', got an object with {list(rows[0])}.")
    prompt = columns.pop("prompt")
    fields = {name: _take(columns, name, name) for name in RECORD_FIELDS}
    return Record(prompt, tuple(completions), Ratings(tuple(labels), 0, 1), columns=columns, **fields)


# -- what else is in a row -------------------------------------------------------------------------------------------


def _take_completion(columns: dict[str, Any], side: str, text: object) -> Completion:
    """A completion, with what the row has of it under `chosen_policy` and so on; complete where it does not say."""
    fields = {name: _take(columns, f"{side}_{name}", name) for name in COMPLETION_FIELDS[:-1]}
    columns.setdefault(f"{side}_ended", True)
    return Completion(text, ended=_take(columns, f"{side}_ended", "ended"), **fields)  # type: ignore[arg-type]


def fills_field(column: str, value: object) -> bool:
    """Whether a column of a row would be read as a field of its record or of a completion."""
    side, _, name = column.partition("_")
    if side in (*PAIR, "completion") and name in COMPLETION_FIELDS:
        return value is None or _FITS[name](value)
    return column in (*RECORD_FIELDS, "margin") and (value is None or _FITS[column](value))


def _take(columns: dict[str, Any], column: str, name: str) -> Any:
    """The value of a column that fits a field, taken out of the row; None for any other, which stays there."""
    if column not in columns:
        return None
    if columns[column] is None:
        return columns.pop(column)
    return columns.pop(column) if _FITS[name](columns[column]) else None
