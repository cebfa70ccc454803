"""What is known of a task's optimum, and what of it is stored beside the built-in tasks."""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass
from typing import Any

ARTEFACTS = os.path.join(os.path.dirname(__file__), "artefacts")


@dataclass(frozen=True)
class StoredOptimum:
    """What is known of V* on a split, the mean over its prompts, in units of the score.

    Attributes:
        method: how it was computed (docs/optimum.md).
        value: V*, or the middle of its bounds; the lower bound where there is no upper one.
        lower: what V* is at least. upper: what it is at most; None where nothing is known. Both are `value` if that is
            exact. Bounds from samples are the outer ends of 95 % intervals.
        reference: J of the reference.
        reference_half_width: half of the 95 % interval of `reference` if it comes from samples; 0 if it is exact.
        assumption: what `upper` assumes and what that may cost, in words; empty if it assumes nothing.
    """

    method: str
    value: float
    lower: float
    upper: float | None
    reference: float
    reference_half_width: float = 0.0
    assumption: str = ""

    def __repr__(self) -> str:
        return f"StoredOptimum(V* {self.describe()}, J_ref {self.reference:.4f}, by {self.method})"

    def describe(self) -> str:
        """What is known of V*, in a few characters."""
        if self.exact:
            return f"= {self.value:.4f}"
        return f">= {self.lower:.4f}" if self.upper is None else f"{self.lower:.4f} to {self.upper:.4f}"

    @property
    def exact(self) -> bool:
        """Whether `value` is V* itself, up to rounding."""
        return self.lower == self.upper

    @property
    def width(self) -> float:
        """How far the bounds are apart, as a share of the gain V* - J_ref; inf where nothing is known above."""
        if self.exact:
            return 0.0
        if self.upper is None:
            return math.inf
        return (self.upper - self.lower) / (self.value - self.reference)


@functools.cache
def _stored(family: str) -> dict[str, Any]:
    path = os.path.join(ARTEFACTS, family, "optima.json")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def stored_optima(name: str, version: int) -> dict[str, StoredOptimum]:
    """What `python -m builders.optima` has stored of a built-in task, by split; empty where that is nothing."""
    stored = _stored(name.partition("-")[0]).get(name, {})
    if stored.get("version") != version:
        return {}
    return {split: StoredOptimum(**optimum) for split, optimum in stored["splits"].items()}
