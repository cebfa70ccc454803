"""Records as objects of JSON: the form of lmgym's own files."""

from __future__ import annotations

import dataclasses
import difflib
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
_MISSPELT = 0.8  # likeness of a name to a field's, from which on it is taken for that
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
    """The record of an object of JSON, as `record_to_json` makes it; what has another name goes into `columns`.

    Raises:
        InvalidArgumentError: naming the field that is missing, misspelt, or cannot be so.
    """
    if not isinstance(row, Mapping):
        raise InvalidArgumentError(f"a record must be an object, got {shorten(row)}.")
    fields = dict(_check_fields("a record", gather_columns(row), _RECORD_FIELDS, {"prompt", "completions"}))
    items = check_sequence("completions", fields["completions"])
    fields["completions"] = tuple(_completion_from_json(i, item) for i, item in enumerate(items))
    if fields.get("judgement") is not None:
        fields["judgement"] = judgement_from_json(fields["judgement"])
    fields["columns"] = as_columns(fields.get("columns"))
    return Record(**fields)


def gather_columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with all that is no field of a record under `columns`.

    Raises:
        InvalidArgumentError: for a name that looks like a field misspelt, and for one that `columns` has already.
    """
    others = {name: value for name, value in row.items() if name not in _RECORD_FIELDS}
    if not others:
        return row
    columns = as_columns(row.get("columns"))
    for name in others:
        if name in columns:
            raise InvalidArgumentError(f"`{name}` must be in the row or in its `columns`, got both.")
        if not isinstance(name, str) or difflib.get_close_matches(name, _RECORD_FIELDS, n=1, cutoff=_MISSPELT):
            unknown = unknown_name("field of a record", name, _RECORD_FIELDS)
            raise InvalidArgumentError(f"{unknown} Anything of your own with such a name goes under 'columns'.")
    fields = {name: value for name, value in row.items() if name in _RECORD_FIELDS}
    return {**fields, "columns": {**columns, **others}}


def as_columns(given: object) -> Mapping[str, Any]:
    """What a row has under `columns`, where null is nothing.

    Raises:
        InvalidArgumentError: for what is no object.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(f"`columns` must be a dict, got {shorten(given)}.")
    return given


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
    what: str, row: Mapping[str, Any], known: Collection[str], required: AbstractSet[str]
) -> Mapping[str, Any]:
    """An object of JSON that has the fields it must have, and no others."""
    if not required <= row.keys():
        missing = sorted(required - row.keys())
        raise InvalidArgumentError(f"{what} must have {missing}, got an object with {list(row)}.")
    for name in row:
        if name not in known:
            raise unknown_name(f"field of {what}", name, known)
    return row
