"""Options of a command line, as `name=value`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, get_type_hints

from lmgym.errors import InvalidArgumentError, unknown_name

Options = TypeVar("Options")
_WORDS = {"true": True, "false": False}


def read_options(kind: type[Options], words: Sequence[str]) -> Options:
    """The options in the words of a command line: a dataclass with fields of type str, int, float or bool.

    Raises:
        InvalidArgumentError: for a word that is no option, an option given twice, and a value of another type.
        UnknownNameError: for an option that the dataclass has not.
    """
    types = get_type_hints(kind)
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise InvalidArgumentError(f"An option must be `name=value`, got {word!r}.")
        if name not in types:
            raise unknown_name("option", name, types)
        if name in given:
            raise InvalidArgumentError(f"`{name}` must be given once, got it twice.")
        given[name] = _read(name, text, types[name])
    return kind(**given)


def _read(name: str, text: str, kind: type) -> Any:
    try:
        return _WORDS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise InvalidArgumentError(f"`{name}` must be of type {kind.__name__}, got {text!r}.") from error
