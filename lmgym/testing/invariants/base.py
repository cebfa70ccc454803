"""An invariant: what must hold, how far numbers may be off, and a function that measures how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.testing.adapter import TrainerAdapter

Gaps = Iterator[tuple[str, float]]  # what was compared, and how far apart the two are

FLOAT32 = "float32 of a model of two layers"
ROUNDING = "rounding of float32"


@dataclass(frozen=True)
class Invariant:
    """A property of a trainer.

    Attributes:
        name: a short handle. statement: what must hold, in one line.
        needs: the functions of an adapter that are asked.
        tolerance: the largest gap that holds. reason: why that large.
        measure: yields gaps of a trainer.
    """

    name: str
    statement: str
    needs: tuple[str, ...]
    tolerance: float
    reason: str
    measure: Callable[[TrainerAdapter], Gaps]


def invariant(
    name: str, *needs: str, tolerance: float, reason: str
) -> Callable[[Callable[[TrainerAdapter], Gaps]], Invariant]:
    """Makes an invariant of a function whose docstring is the statement."""

    def make(measure: Callable[[TrainerAdapter], Gaps]) -> Invariant:
        assert measure.__doc__ is not None
        return Invariant(name, measure.__doc__.strip().splitlines()[0], needs, tolerance, reason, measure)

    return make


def largest_gap(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """The largest absolute difference, where a mask is True if one is given."""
    gaps = (found.detach().double() - expected.detach().double()).abs()
    if mask is not None:
        gaps = gaps[mask]
    return gaps.max().item() if gaps.numel() else 0.0


def angle_gap(found: Tensor, expected: Tensor) -> float:
    """How far a vector is from a positive multiple of another: 0 is along it, 1 at a right angle or worse than none.

    It is the norm of what is left of `found` after the best multiple is taken away, by the norm of `found`; 1 where
    that multiple is negative or `found` is 0.
    """
    found = found.detach().double().flatten()
    expected = expected.detach().double().flatten()
    scale = (found @ expected) / (expected @ expected)
    if not torch.isfinite(found).all():
        return float("nan")
    if not scale > 0:
        return 1.0
    return ((found - scale * expected).norm() / found.norm()).item()
