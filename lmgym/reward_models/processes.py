"""What the processes of one training tell each other, where torchrun or accelerate has started several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Value = TypeVar("Value")


def gather(value: Value, count: int) -> list[Value]:
    """What each of `count` processes gives here, by rank; a single one exchanges nothing."""
    if count == 1:
        return [value]
    values: list[Value] = [value] * count
    torch.distributed.all_gather_object(values, value)
    return values


def mean_of_sums(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over processes of each of their numbers; one that a process does not have is 0 there."""
    means: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            means[name] = means.get(name, 0.0) + value / len(parts)
    return means
