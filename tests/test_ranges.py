"""What the type of a field says of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from lmgym.errors import LmGymError
from lmgym.ranges import (
    Count,
    CountOrZero,
    Decay,
    Fraction,
    NonNegative,
    Positive,
    PositiveFraction,
    Range,
    check_fields,
    check_value,
    number_type,
)

ALLOWED: dict[Any, list[Any]] = {
    NonNegative: [0, 0.0, 1e-300, 1e300],
    Positive: [1e-300, 7],
    Fraction: [0, 0.5, 1],
    PositiveFraction: [1e-300, 1],
    Decay: [0, 0.999],
    Count: [1, 10**9],
    CountOrZero: [0, 1],
    Annotated[int, Range(2, 4)]: [2, 4],
    Annotated[float, "metres"]: [-1.0, "any"],  # a note that is no range
    NonNegative | None: [None, 0.0],
    Literal["a", "b"]: ["a", "b"],
    Literal["a", "b"] | None: [None, "a"],
    Literal[1, "auto"]: [1, "auto"],
    int: [-3],
    float: [-3, 2.5],
    bool: [True],
    str: [""],
    int | str: [1, "a", 2.5],  # of several types none is checked
    dict[str, Any]: [3],
    Any: [object()],
}
REFUSED: dict[Any, list[Any]] = {
    NonNegative: [-1e-300, float("nan"), float("inf"), True, "1", None],
    Positive: [0, 0.0, -1],
    Fraction: [-0.1, 1.1],
    PositiveFraction: [0, 1.1],
    Decay: [-0.1, 1, 1.0],
    Count: [0, 1.0, True, None, "1"],
    CountOrZero: [-1],
    Annotated[int, Range(2, 4)]: [1, 5],
    NonNegative | None: [-1, "none"],
    Literal["a", "b"]: ["c", None, 1],
    Literal[1, "auto"]: [True, 1.0, "1", 2],
    int: [1.0, True, None],
    float: ["1", False, None],
    bool: [1, 0, "true", None],
    str: [1, None, True],
}


@pytest.mark.parametrize("kind", ALLOWED, ids=str)
def test_what_a_type_allows_passes(kind: Any) -> None:
    for value in ALLOWED[kind]:
        check_value("x", value, kind)


@pytest.mark.parametrize("kind", REFUSED, ids=str)
def test_what_a_type_does_not_allow_is_named(kind: Any) -> None:
    for value in REFUSED[kind]:
        with pytest.raises(LmGymError, match="^`agent.x` must be .*, got "):
            check_value("agent.x", value, kind)


def test_a_number_keeps_its_plain_type() -> None:
    kinds = (NonNegative | None, Count, float | None, str, int | str)
    assert [number_type(kind) for kind in kinds[:4]] == [float, int, float, str]
    assert number_type(kinds[4]) not in (int, float)


@dataclass(frozen=True)
class Numbers:
    lr: NonNegative = 1e-3
    kind: Literal["slow", "fast"] = "slow"

    def __post_init__(self) -> None:
        check_fields(self)


def test_a_dataclass_checks_its_own_fields() -> None:
    assert Numbers(2).lr == 2
    with pytest.raises(LmGymError, match="`lr` must be a finite number >= 0, got -1"):
        Numbers(-1)
    with pytest.raises(LmGymError, match="Did you mean 'fast'"):
        Numbers(kind="fasr")  # type: ignore[arg-type]
