"""How a batch may come out, and how likely: by enumeration, with nothing sampled.

Shapes: X prompts, R responses of all prompts together, G responses of a group, W ways, K classes of responses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError

MAX_WAYS = 1_000_000


class Ways(NamedTuple):
    """`rows` (W, B) of episodes, one batch or group a row, and `probs` (W,), which sum to 1."""

    rows: Tensor
    probs: Tensor


def judge_each(probs: Tensor, classes: Tensor, group_size: int) -> Ways:
    """Every response, and what the rest of its group may be: (W, G) with that response in front.

    The others count by their class alone: it is enough to know how many there are of each (multinomial counts).

    Args:
        probs: (X, R / X) of the responses to each prompt, as sampled.
        classes: (R,) int64: responses of one class are the same to the others of their group.
        group_size: G.

    Raises:
        InvalidArgumentError: where there are more than a million ways.
    """
    found = []
    for x, p in enumerate(probs):
        first = x * len(p)
        kinds, index = classes[first : first + len(p)].unique(return_inverse=True)
        mass = p.new_zeros(len(kinds)).index_add(0, index, p)
        member = torch.zeros(len(kinds), dtype=torch.int64).scatter(0, index, torch.arange(len(p)))
        others, counts = _multisets(len(kinds), group_size - 1)
        _check_ways(len(probs) * len(p) * len(others))
        shares = counts * mass[others].prod(1)  # (M,)
        own = torch.arange(len(p)).repeat_interleave(len(others))
        rest = member[others].repeat(len(p), 1)
        rows = first + torch.cat([own.unsqueeze(1), rest], 1)
        found.append(Ways(rows, (p.unsqueeze(1) * shares).flatten() / len(probs)))
    return Ways(torch.cat([ways.rows for ways in found]), torch.cat([ways.probs for ways in found]))


def enumerate_batches(probs: Tensor, group_size: int, groups: int) -> Ways:
    """Every batch of some groups, each to a prompt of its own choice: (W, groups * G).

    The order within a group, which no loss depends on, counts once, with the number of its orders.

    Args:
        probs: (X, R / X) of the responses to each prompt, as sampled. group_size: G. groups: of a batch.

    Raises:
        InvalidArgumentError: where there are more than a million batches.
    """
    members, orders = _multisets(probs.shape[1], group_size)
    _check_ways((len(probs) * len(members)) ** groups)
    starts = probs.shape[1] * torch.arange(len(probs)).view(-1, 1, 1)
    rows = (starts + members).flatten(0, 1)  # (X * M, G)
    single = (orders * probs[:, members].prod(2) / len(probs)).flatten()
    choices = torch.tensor(list(product(range(len(rows)), repeat=groups)))
    return Ways(rows[choices].flatten(1), single[choices].prod(1))


@cache
def _multisets(kinds: int, size: int) -> tuple[Tensor, Tensor]:
    """(M, size) all multisets of `size` of so many kinds, and (M,) float64 in how many orders each can come."""
    _check_ways(math.comb(kinds + size - 1, size))
    members = list(combinations_with_replacement(range(kinds), size))
    orders = [math.factorial(size) / math.prod(math.factorial(n) for n in _runs(each)) for each in members]
    return torch.tensor(members, dtype=torch.int64).view(len(members), size), torch.tensor(orders, dtype=torch.float64)


def _runs(members: tuple[int, ...]) -> Iterator[int]:
    """How often each kind is in a multiset."""
    for kind in set(members):
        yield members.count(kind)


def _check_ways(count: int) -> None:
    if count > MAX_WAYS:
        raise InvalidArgumentError(
            f"`tree` must be so small that a batch comes out in at most {MAX_WAYS:,} ways, got {count:,}: take fewer "
            "or shorter responses, or smaller groups."
        )
