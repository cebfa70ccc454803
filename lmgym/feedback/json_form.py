"""Records as objects of JSON: the form of lmgym's own files."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from lmgym.errors import InvalidArgumentError, LmGymError, check_choice, shorten, unknown_name
from lmgym.feedback.fields import Text, check_sequence
from lmgym.feedback.judgements import KINDS, Judgement
from lmgym.feedback.records import Completion, Record, as_completion

_RECORD_FIELDS = (
    "id",
    "prompt",
    "completions",
    "judgement",
    "annotator",
    "time",
    "seconds",
    "order_shown",
    "columns",
)
_COMPLETION_FIELDS = tuple(item.name for item in dataclasses.fields(Completion))
_JUDGEMENT_FIELDS = {name: tuple(item.name for item in dataclasses.fields(kind)) for name, kind in KINDS.items()}
_REQUIRED = {
    name: frozenset(item.name for item in dataclasses.fields(kind) if item.default is dataclasses.MISSING)
    for name, kind in KINDS.items()
}


def record_to_json(record: Record) -> dict[str, Any]:
    """A record as an object of JSON; what is None or empty is left out, and a completion of text alone is its text."""
    written: dict[str, Any] = {}
    for name in _RECORD_FIELDS:
        value = getattr(record, name)
        if value is None or (name == "columns" and not value):
            continue
        if name == "prompt":
            value = text_to_json(value)
        elif name == "completions":
            value = [_completion_to_json(completion) for completion in value]
        elif name == "judgement":
            value = judgement_to_json(value)
        written[name] = value
    return written


def judgement_to_json(judgement: Judgement) -> dict[str, Any]:
    """A judgement as an object of JSON, with its kind."""
    written: dict[str, Any] = {"kind": judgement.kind}
    for name in _JUDGEMENT_FIELDS[judgement.kind]:
        value = getattr(judgement, name)
        if value is not None:
            written[name] = text_to_json(value) if name == "text" else value
    return written


def _completion_to_json(completion: Completion) -> Any:
    written: dict[str, Any] = {"text": text_to_json(completion.text)}
    for name in _COMPLETION_FIELDS[1:]:
        value = getattr(completion, name)
        if value is not None:
            written[name] = value
    return written["text"] if len(written) == 1 and isinstance(completion.text, str) else written


def text_to_json(text: Text) -> Any:
    """A text, or messages as objects of JSON."""
    return text if isinstance(text, str) else [message._asdict() for message in text]


def record_from_json(row: object) -> Record:
    """The record of an object of JSON, as `record_to_json` makes it.

    Raises:
        InvalidArgumentError: naming the field that is missing, unknown, or cannot be so.
    """
    fields = dict(_check_fields("a record", row, _RECORD_FIELDS, {"prompt", "completions"}, "columns"))
    items = check_sequence("completions", fields["completions"])
    fields["completions"] = tuple(_completion_from_json(i, item) for i, item in enumerate(items))
    if fields.get("judgement") is not None:
        fields["judgement"] = judgement_from_json(fields["judgement"])
    if fields.get("columns", {}) is None:
        del fields["columns"]
    return Record(**fields)


def judgement_from_json(row: object) -> Judgement:
    """The judgement of an object of JSON.

    Raises:
        InvalidArgumentError: as `record_from_json`.
    """
    if not isinstance(row, Mapping) or "kind" not in row:
        raise InvalidArgumentError(f'`judgement` must be an object with a "kind", got {shorten(row)}.')
    fields = dict(row)
    name = fields.pop("kind")
    check_choice("judgement.kind", name, KINDS)
    return KINDS[name](**_check_fields(f"a {name}", fields, _JUDGEMENT_FIELDS[name], _REQUIRED[name]))


def _completion_from_json(index: int, item: object) -> Completion:
    if not isinstance(item, Mapping):
        return as_completion(index, item)
    try:
        return Completion(**_check_fields("a completion", item, _COMPLETION_FIELDS, {"text"}))
    except LmGymError as error:
        raise InvalidArgumentError(f"`completions[{index}]`: {error}") from error


def _check_fields(
    what: str, row: object, known: Collection[str], required: AbstractSet[str], rest: str | None = None
) -> Mapping[str, Any]:
    """An object of JSON that has the fields it must have, and no others."""
    if not isinstance(row, Mapping):
        raise InvalidArgumentError(f"{what} must be an object, got {shorten(row)}.")
    if not required <= row.keys():
        missing = sorted(required - row.keys())
        raise InvalidArgumentError(f"{what} must have {missing}, got an object with {list(row)}.")
    for name in row:
        if name not in known:
            also = "" if rest is None else f" Anything of your own goes under {rest!r}."
            raise InvalidArgumentError(f"{unknown_name(f'field of {what}', name, known)}{also}")
    return row
