"""The order in which examples are learned from, and the learning rate as it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from lmgym.reward_models.examples import Batch, Example

_BUCKET_BATCHES = 16  # batches that are sorted by length together

Key = tuple[int, float]  # an example, and the share of the loss of its forward


def bucketed_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yields the indices 0..B-1 once, shuffled, in batches whose members are of like length: less padding."""
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    window = _BUCKET_BATCHES * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        bucket = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def warm_up_cosine(step: int, total: int, warm_up: float) -> float:
    """Factor of the learning rate at update `step` of `total`: linear up over the share `warm_up`, then cosine to 0."""
    rise = warm_up * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


class Examples(Dataset[tuple[Example, float]]):
    """Examples by their keys."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, key: Any) -> tuple[Example, float]:
        index, share = key
        return self._examples[index], share


def collate(items: Sequence[tuple[Example, float]]) -> dict[str, Batch]:
    """The batch of some examples; under a name, because Trainer passes arguments by name."""
    return {"batch": Batch([example for example, _ in items], items[0][1])}


class ForwardSampler(Sampler[list[Key]]):
    """Yields the examples of every forward, pass by pass in another order; all orders are drawn at the beginning.

    An update is always of the same number of forwards, so that whoever counts forwards counts updates. Where it has
    fewer examples than that, the others repeat one of them and count nothing.

    Args:
        lengths: of the examples in tokens. weights: what each counts in the loss of an update.
        batch_size: examples an update. forwards: how many forwards these are split into.
        epochs: passes. generator: of the orders.
        rank, world: this process and how many there are; each reads every `world`-th forward.

    Attributes:
        epoch: the pass that the next iteration is of.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        *,
        batch_size: int,
        forwards: int,
        epochs: int,
        generator: torch.Generator,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.epoch = 0
        self.updates = math.ceil(len(lengths) / batch_size)
        self._weights = weights
        self._forwards = forwards
        self._rank = rank
        self._world = world
        self._orders = [list(bucketed_batches(lengths, batch_size, generator)) for _ in range(epochs)]

    def __len__(self) -> int:
        return self.updates * self._forwards // self._world

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self._orders[self.epoch]:
            yield from self._split(batch)[self._rank :: self._world]

    def _split(self, batch: Sequence[int]) -> list[list[Key]]:
        """The forwards of an update, of like numbers of examples."""
        if self._forwards == 1:
            return [[(index, 1.0) for index in batch]]
        whole = sum(self._weights[index] for index in batch)
        split = []
        for part in range(self._forwards):
            rows = batch[part * len(batch) // self._forwards : (part + 1) * len(batch) // self._forwards]
            share = self._forwards * sum(self._weights[index] for index in rows) / whole
            split.append([(index, share) for index in rows or batch[:1]])
        return split
