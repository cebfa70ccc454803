"""Rows: dicts of named columns, from a list, a data set, a table or a file, with where each one stands."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmgym.data.files import read_file
from lmgym.errors import InvalidArgumentError, shorten


@dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
        columns: its values by name. location: where it stands, for messages: "line 3 of 'prompts.jsonl'", or "item 3".
    """

    columns: Mapping[str, Any]
    location: str


def read_rows(argument: str, source: object, key: str) -> list[Row]:
    """Rows from a list of texts or dicts, a `datasets.Dataset`, a pandas table, or a file (`lmgym.data.files`).

    Args:
        argument: what the rows were given as, for messages. source: where they are.
        key: the column that a bare text is.

    Raises:
        InvalidArgumentError: for anything else, for no rows at all, and naming the first item that is no row.
    """
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if not isinstance(path, str):
            raise InvalidArgumentError(f"`{argument}` must be a path as a text, got {path!r}.")
        items = [(f"{location} of {path!r}", item) for location, item in read_file(argument, path)]
    else:
        items = [(f"item {index}", item) for index, item in enumerate(_iterate(argument, source))]
    if not items:
        raise InvalidArgumentError(f"`{argument}` must be a non-empty list of texts or rows, got {source!r}.")
    return [Row(_columns(argument, key, item, location), location) for location, item in items]


def _iterate(argument: str, source: object) -> Iterator[Any]:
    """The items of what is no file."""
    if hasattr(source, "iloc") and hasattr(source, "columns"):  # a pandas table iterates over its columns' names
        return iter(source.to_dict("records"))  # type: ignore[attr-defined]
    is_list = isinstance(source, Sequence) and not isinstance(source, bytes)
    is_array = isinstance(source, np.ndarray) and source.ndim == 1
    is_data_set = hasattr(source, "column_names") and hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not (is_list or is_array or is_data_set) or isinstance(source, Mapping):
        raise InvalidArgumentError(f"`{argument}` must be a non-empty list of texts or rows, got {source!r}.")
    return iter(source)  # type: ignore[call-overload]


def _columns(argument: str, key: str, item: object, location: str) -> dict[str, Any]:
    if isinstance(item, str):
        return {key: item}
    if not isinstance(item, Mapping) or not all(isinstance(name, str) for name in item):
        raise InvalidArgumentError(
            f'`{argument}` must hold texts or rows with a "{key}", and {location} is {shorten(item)}.'
        )
    return dict(item)


def column(argument: str, row: Row, key: str) -> Any:
    """A column that every row must have.

    Raises:
        InvalidArgumentError: naming the row and the columns that it has.
    """
    if key not in row.columns:
        raise InvalidArgumentError(
            f'`{argument}` must hold rows with a "{key}", and {row.location} has the columns {list(row.columns)}.'
        )
    return row.columns[key]


def check_text(argument: str, text: object, location: str, *, may_be_empty: bool = False) -> str:
    """A text that a tokenizer can read.

    Raises:
        InvalidArgumentError: for what is no text, an empty one, and one with half of a surrogate pair in it.
    """
    if not isinstance(text, str) or not (text.strip() or may_be_empty):
        raise InvalidArgumentError(f"`{argument}` must hold non-empty texts, and {location} is {shorten(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"`{argument}` must hold Unicode texts, and {location} has half of a surrogate pair, "
            f"{text[error.start]!r}: {shorten(text)}."
        ) from error
    return str(text)


def read_texts(argument: str, source: object, key: str) -> tuple[str, ...]:
    """Texts from a list of texts or rows, a data set, a table, or a file; of a row the text under `key`.

    Raises:
        InvalidArgumentError: naming the first row that has no text there, or an empty one.
    """
    rows = read_rows(argument, source, key)
    return tuple(check_text(argument, column(argument, row, key), row.location) for row in rows)
