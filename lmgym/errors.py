"""The errors lmgym raises, and the phrases they share.

Every message names the argument in backticks, says what was expected and what came, and for names what was meant.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable
from typing import Any


class LmGymError(Exception):
    """Base class of every error that lmgym raises on purpose."""


class InvalidArgumentError(LmGymError, ValueError):
    """An argument has a value outside what it may be."""


class UnknownNameError(LmGymError, ValueError):
    """A name (of a task, a split, an algorithm) that nothing is registered under."""


class UnknownKeywordError(UnknownNameError, TypeError):
    """A keyword argument that does not exist; a TypeError too, since that is what callers look for."""


class InvalidActionError(LmGymError, ValueError):
    """An action outside the action space, or one that cannot be taken in this state."""


class RewardError(LmGymError, RuntimeError):
    """A reward function broke its contract: a wrong number of scores, or one that is not a finite number."""


class NotFiniteError(LmGymError, ArithmeticError):
    """A number that a policy or its training has come to is NaN or infinite."""


class LogProbError(LmGymError, RuntimeError):
    """The log-probs handed over are not those of the distribution that sampled the tokens."""


def check_finite(name: str, got: float) -> None:
    """Raises `NotFiniteError` unless a number that training has come to is finite."""
    if not math.isfinite(got):
        raise NotFiniteError(f"Training has diverged: the {name} is {got}. Try a lower learning rate.")


def shorten(value: object, limit: int = 200) -> str:
    """The repr of a value, its middle left out where it is long."""
    try:
        text = repr(value)
    except Exception as error:  # such as an int of thousands of digits, or another library's own
        return f"a {type(value).__name__} ({error})"
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"


def unknown_name(argument: str, got: object, choices: Iterable[str], listed_by: str = "") -> UnknownNameError:
    """Builds the error for an unknown name, with the nearest known one as a suggestion.

    Args:
        argument: what the message calls it. got: the name. choices: the known ones.
        listed_by: what shows them, where they are too many for a message.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(got if isinstance(got, str) else "", known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    expected = f"one of the {len(known)} names that {listed_by} lists" if listed_by else f"one of {known}"
    return UnknownNameError(f"`{argument}` must be {expected}, got {shorten(got)}.{hint}")


def unknown_keyword(function: str, got: str, choices: Iterable[str]) -> UnknownKeywordError:
    """Builds the error for an unknown keyword argument, with Python's own words, which other libraries search for."""
    unknown = unknown_name("keyword argument", got, choices)
    return UnknownKeywordError(f"{function}() got an unexpected keyword argument {got!r}. {unknown}")


def check_choice(argument: str, got: object, choices: Iterable[str]) -> None:
    """Raises `UnknownNameError` unless `got` is one of `choices`."""
    known = list(choices)
    if not isinstance(got, str) or got not in known:
        raise unknown_name(argument, got, known)


def check_number(
    argument: str, got: Any, low: float, high: float = float("inf"), *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raises `InvalidArgumentError` unless `got` is a finite number (not a bool) in [low, high], an end left out."""
    number = isinstance(got, (int, float)) and not isinstance(got, bool) and abs(got) <= sys.float_info.max
    if not number or not (low < got if open_low else low <= got) or not (got < high if open_high else got <= high):
        left = f"> {low:g}" if open_low else f">= {low:g}"
        right = f" and {'<' if open_high else '<='} {high:g}" if high != float("inf") else ""
        raise InvalidArgumentError(f"`{argument}` must be a finite number {left}{right}, got {shorten(got)}.")


def check_int(argument: str, got: Any, low: int, high: int | None = None) -> None:
    """Raises `InvalidArgumentError` unless `got` is an int (not a bool) in [low, high]."""
    if not isinstance(got, int) or isinstance(got, bool) or got < low or (high is not None and got > high):
        right = f" and <= {high}" if high is not None else ""
        raise InvalidArgumentError(f"`{argument}` must be an int >= {low}{right}, got {shorten(got)}.")


def check_bool(argument: str, got: Any) -> None:
    """Raises `InvalidArgumentError` unless `got` is a bool."""
    if not isinstance(got, bool):
        raise InvalidArgumentError(f"`{argument}` must be True or False, got {shorten(got)}.")
