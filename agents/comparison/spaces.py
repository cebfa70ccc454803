"""What is tuned: distributions of a command line, and settings drawn from them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmgym.errors import InvalidArgumentError, check_choice, check_number

_NUMBERS = ("loguniform", "uniform", "randint")
KINDS = (*_NUMBERS, "choice")


@dataclass(frozen=True)
class Space:
    """A key, and the distribution of its values.

    Attributes:
        key: of the config, such as "agent.lr". text: the distribution as it was written.
        kind: one of `KINDS`. values: its arguments.
    """

    key: str
    text: str
    kind: str
    values: tuple[str, ...]

    def draw(self, rng: np.random.Generator) -> str:
        """A value, as on a command line."""
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = map(float, self.values)
        if self.kind == "randint":
            return str(int(rng.integers(int(low), int(high), endpoint=True)))
        if self.kind == "uniform":
            return f"{rng.uniform(low, high):.4g}"
        return f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}"


def read_spaces(text: str) -> tuple[Space, ...]:
    """Reads `agent.lr:loguniform(1e-4,1e-2),agent.epochs:choice(1,2,4)`.

    Raises:
        LmGymError: naming what cannot be read.
    """
    spaces = [_read(part.strip()) for part in re.split(r",(?![^(]*\))", text)]
    if len({space.key for space in spaces}) < len(spaces):
        raise InvalidArgumentError(f"`tune` must name every key once, got {text!r}.")
    return tuple(spaces)


def _read(text: str) -> Space:
    match = re.fullmatch(r"([\w.]+)\s*:\s*(\w+)\(([^()]*)\)", text)
    if match is None:
        raise InvalidArgumentError(f"`tune` must be such as agent.lr:loguniform(1e-4,1e-2), got {text!r}.")
    key, kind, inside = match.groups()
    check_choice(f"tune: {key}", kind, KINDS)
    values = tuple(value.strip() for value in inside.split(",") if value.strip())
    if kind in _NUMBERS:
        _check_range(key, kind, values)
    elif not values:
        raise InvalidArgumentError(f"`tune: {key}` must choose between values, got none.")
    return Space(key, f"{kind}({','.join(values)})", kind, values)


def _check_range(key: str, kind: str, values: Sequence[str]) -> None:
    try:
        low, high = map(float, values)
    except ValueError:
        raise InvalidArgumentError(f"`tune: {key}` must be {kind}(low,high), got {list(values)}.") from None
    if not low < high:
        raise InvalidArgumentError(f"`tune: {key}` must go from a number to a larger one, got {low:g} to {high:g}.")
    if kind == "loguniform":
        check_number(f"tune: {key}", low, 0, open_low=True)
    if kind == "randint" and not (low.is_integer() and high.is_integer()):
        raise InvalidArgumentError(f"`tune: {key}` must be whole numbers, got {list(values)}.")
