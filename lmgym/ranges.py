"""What a value may be, written once: as the type of its field.

`lr: NonNegative = 1e-3` is read by the check of the dataclass, and by code that reads the source alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lmgym.errors import InvalidArgumentError, check_bool, check_choice, check_int, check_number, shorten


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, an end left out where it is open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def check(self, argument: str, got: Any, kind: type) -> None:
        """Raises `InvalidArgumentError` unless a value is a number of this range; `kind` is int or float."""
        if kind is int:
            check_int(argument, got, int(self.low), None if math.isinf(self.high) else int(self.high))
        else:
            check_number(argument, got, self.low, self.high, open_low=self.open_low, open_high=self.open_high)


Finite = Annotated[float, Range(-math.inf)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, open_low=True)]
Decay = Annotated[float, Range(0, 1, open_high=True)]
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]

_NAMES = {int: "an int", float: "a number", str: "a text"}


def check_value(argument: str, got: Any, kind: Any) -> None:
    """Raises unless a value is of a type: None, a word of a `Literal`, a bool, a text, or a number in its range.

    Args:
        argument: what the message calls it. got: the value. kind: its type; one of another sort is not checked.

    Raises:
        UnknownNameError: for a word that is none of a `Literal`.
        InvalidArgumentError: for any other value.
    """
    kind, may_be_none = _without_none(kind)
    if got is None and may_be_none:
        return
    if get_origin(kind) is Literal:
        _check_literal(argument, got, get_args(kind))
    elif get_origin(kind) is Annotated:
        number, allowed = get_args(kind)[:2]
        if isinstance(allowed, Range):
            allowed.check(argument, got, number)
    elif kind is bool:
        check_bool(argument, got)
    elif kind in _NAMES and (isinstance(got, bool) or not isinstance(got, (int, float) if kind is float else kind)):
        raise InvalidArgumentError(f"`{argument}` must be {_NAMES[kind]}, got {shorten(got)}.")


def _check_literal(argument: str, got: Any, choices: tuple[Any, ...]) -> None:
    if all(isinstance(choice, str) for choice in choices):
        check_choice(argument, got, choices)
    elif (type(got), got) not in [(type(choice), choice) for choice in choices]:
        raise InvalidArgumentError(f"`{argument}` must be one of {list(choices)}, got {shorten(got)}.")


def _without_none(kind: Any) -> tuple[Any, bool]:
    """A type without the None that it may be, and whether it may."""
    if get_origin(kind) not in (Union, UnionType):
        return kind, False
    others = [other for other in get_args(kind) if other is not NoneType]
    return others[0] if len(others) == 1 else Any, NoneType in get_args(kind)


def number_type(kind: Any) -> Any:
    """The plain type of a number in a range, or of one that may be None; any other type as it is."""
    kind, _ = _without_none(kind)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields by name, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def check_fields(config: Any) -> None:
    """Raises as `check_value` unless every field of a dataclass's instance is of its type."""
    for name, kind in field_types(type(config)).items():
        check_value(name, getattr(config, name), kind)
