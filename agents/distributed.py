"""One agent, trained by several processes that start as equals: each plays and reads its rows of every batch.

All processes draw the same prompts, uniforms and minibatches from the same seed, so that a row is the same episode on
however many processes there are. Each decodes its own rows, and then all of them know the whole batch: advantages,
whitening and metrics are those of one process. Each takes the gradient of its own rows of a minibatch, whose losses are
weighted over all of it: the sum over processes is the gradient of the minibatch. Weights, generators and decisions thus
stay equal on all processes, and a checkpoint of one of them is a checkpoint of all.

Shapes: B episodes of the whole batch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import LmGymError

Value = TypeVar("Value")


class ProcessLostError(LmGymError, RuntimeError):
    """Another process of the run has ended before its time, or cannot be reached."""


@dataclass(frozen=True)
class Processes:
    """The processes that train an agent; a single one, for which every operation here is the identity, by default.

    Attributes:
        rank: of this process, from 0. count: of all processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def rows(self) -> slice:
        """This process's rows of any batch: every `count`-th, so that rows sorted by length are dealt out evenly."""
        return slice(self.rank, None, self.count)

    def play(self, count: int, collect: Callable[..., Episodes]) -> Episodes:
        """All of `count` episodes, of which each process plays its own rows; all of them where they do not go round.

        Args:
            collect: plays the episodes of `rows`, a slice, or all of them (`lmgym.rollout.collect`).
        """
        if self.count == 1 or self.count > count:
            return collect()
        return self.join_rows(collect(rows=self.rows))

    def join_rows(self, own: Episodes) -> Episodes:
        """All B episodes in their order, on every process.

        Args:
            own: this process's `rows` of them, on the CPU.
        """
        if self.count == 1:
            return own
        parts = [Episodes(**columns) for columns in self.gather({f.name: getattr(own, f.name) for f in fields(own)})]
        total = sum(len(part) for part in parts)
        order = torch.cat([torch.arange(total)[Processes(rank, self.count).rows] for rank in range(self.count)])
        tokenizer = getattr(own, "_tokenizer", None)
        return Episodes.concatenate(parts)[order.argsort()].with_tokenizer(tokenizer)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes, in place; bitwise the same on each."""
        if self.count == 1:
            return
        with naming_the_lost(self):
            waiting = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in waiting:
                work.wait()

    def all_agree(self, yes: bool) -> bool:
        """Whether all processes say yes; the same answer on each."""
        return all(self.gather(yes))

    def gather(self, value: Value) -> list[Value]:
        """What each process gives here, by rank: small values that can be pickled, tensors on the CPU."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with naming_the_lost(self):
            torch.distributed.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def naming_the_lost(processes: Processes, *, among_others: bool = False) -> Iterator[None]:
    """Has a failed exchange say what has happened, in a line.

    Args:
        processes: that exchange. among_others: whether the block does other things too, whose errors are left alone.
    """
    try:
        yield
    except RuntimeError as error:
        if among_others and not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).partition(". ")[0]  # without the line of its source
        raise ProcessLostError(
            f"Process {processes.rank} of {processes.count} cannot reach the others: one of them has ended, or the "
            f"connection has ({reason[:200]})."
        ) from error
