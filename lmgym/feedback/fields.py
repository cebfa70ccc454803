"""The texts of a record, and checks of the values of its fields."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from lmgym.errors import InvalidArgumentError, shorten


class Message(NamedTuple):
    """A message of a conversation."""

    role: str
    content: str


Text = str | tuple[Message, ...]
"""A text as it is, or the messages of a conversation."""


def check_text(name: str, value: object) -> Text:
    """A text, or messages, which may come as dicts with "role" and "content"; no letter of them is changed.

    Raises:
        InvalidArgumentError: for what is neither, and for half of a surrogate pair, which no file can hold.
    """
    if isinstance(value, str):
        check_unicode(name, value)
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes) and value:
        return tuple(_check_message(f"{name}[{i}]", message) for i, message in enumerate(value))
    raise InvalidArgumentError(f"`{name}` must be a str or a list of messages, got {shorten(value)}.")


def _check_message(name: str, message: Any) -> Message:
    if isinstance(message, Message):
        role = message.role
        content = message.content
    elif isinstance(message, dict) and {name for name in message if message[name] is not None} == {"role", "content"}:
        role = message["role"]
        content = message["content"]
    else:
        raise InvalidArgumentError(f"`{name}` must be a message of a role and a content, got {shorten(message)}.")
    for key, text in (("role", role), ("content", content)):
        check_str(f"{name}.{key}", text)
    return Message(role, content)


def check_str(name: str, value: object) -> None:
    """Raises `InvalidArgumentError` for what is no text, or has half of a surrogate pair in it."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"`{name}` must be a str, got {shorten(value)}.")
    check_unicode(name, value)


def check_unicode(name: str, text: str) -> None:
    """Raises `InvalidArgumentError` for a text with half of a surrogate pair in it, which no UTF-8 file can hold."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"`{name}` must be Unicode, and has half of a surrogate pair, {text[error.start]!r}: {shorten(text)}."
        ) from error


def check_sequence(name: str, value: Any) -> tuple[Any, ...]:
    """The items of a list, a tuple or an array.

    Raises:
        InvalidArgumentError: for anything else, a text too.
    """
    try:
        items = None if isinstance(value, (str, bytes, dict)) else tuple(value)
    except TypeError:
        items = None
    if items is None:
        raise InvalidArgumentError(f"`{name}` must be a list, got {shorten(value)}.")
    return items


def check_index(name: str, value: Any) -> int:
    """An integer >= 0, NumPy's too, as an int.

    Raises:
        InvalidArgumentError: for anything else.
    """
    try:
        index = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        index = -1
    if index < 0:
        raise InvalidArgumentError(f"`{name}` must be the index of a completion, an int >= 0, got {shorten(value)}.")
    return index


def check_range(name: str, index: int, num_completions: int) -> None:
    """Raises `InvalidArgumentError` unless an index is that of one of K completions."""
    if index >= num_completions:
        raise InvalidArgumentError(
            f"`{name}` must be the index of one of {num_completions} completions, 0 to {num_completions - 1}, "
            f"got {index}."
        )


def check_json(name: str, value: object) -> None:
    """Raises `InvalidArgumentError` for what JSON cannot hold: NaN, an object, a name that is no text."""
    if value is None or isinstance(value, bool | int):
        return
    if isinstance(value, str):
        check_unicode(name, value)
    elif isinstance(value, float) and math.isfinite(value):
        pass
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_json(f"{name}[{i}]", item)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            check_unicode(name, key)
            check_json(f"{name}[{key!r}]", item)
    else:
        raise InvalidArgumentError(f"`{name}` must be a value that JSON has, got {shorten(value)}.")


def set_field(instance: object, name: str, value: object) -> None:
    """Sets a field of a frozen dataclass while it is being made."""
    object.__setattr__(instance, name, value)
