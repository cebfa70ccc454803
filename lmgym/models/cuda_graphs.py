"""Decoding steps on a GPU as CUDA graphs: one launch a token, where the forward of a model is hundreds.

A graph replays its kernels on the addresses that it was captured with, so the rings of keys and values must not move.
They belong to `StepGraphs`, which decoders borrow one after the other and give back. The graphs read the model's own
parameters, and follow their training.

Shapes: N slots, C ring columns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmgym.models.causal import CausalLM

Step = Callable[..., tuple[Tensor, ...]]
Key = tuple[object, ...]

MAX_WAITING = 2  # rings of a model that wait for their next decoder
_WARM_UPS = 3  # runs before a capture: libraries choose their kernels in the first


class StepGraphs:
    """Rings for N slots, and a graph of the step for each number of slots that it was run with.

    Args:
        step: maps tokens (n,), age (n,), column (1,) and rings (n, heads, C, width), written in place, to outputs.
        slots: N. capacity: C.
        like: keys and values (any, heads, any, width) of every layer, for the shapes of the rings.
    """

    def __init__(self, step: Step, slots: int, capacity: int, like: Sequence[Tensor]) -> None:
        self._step = step
        self.rings = [x.new_zeros((slots, x.shape[1], capacity, x.shape[3])) for x in like]
        device = like[0].device
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._age = torch.zeros(slots, dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    @torch.inference_mode()
    def run(self, tokens: Tensor, age: Tensor, column: Tensor) -> tuple[Tensor, ...]:
        """The step for the first n slots: appends tokens (n,) to age (n,) tokens each, in ring column (1,)."""
        n = len(tokens)
        self._tokens[:n].copy_(tokens)
        self._age[:n].copy_(age)
        self._column.copy_(column)
        if n not in self._graphs:
            self._graphs[n] = self._capture(n)
        graph, outputs = self._graphs[n]
        graph.replay()
        return tuple(x.clone() for x in outputs)  # the next replay writes over them

    def _capture(self, n: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        inputs = [self._tokens[:n], self._age[:n], self._column, *(ring[:n] for ring in self.rings)]
        # Each run writes the same keys into the same column, so that running more than once changes nothing.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._step(*inputs)
        return graph, outputs


def _waiting_graphs(lm: CausalLM) -> list[tuple[Key, StepGraphs]]:
    """An empty list, for graphs whose decoder is no more."""
    return []


def borrow_graphs(
    borrower: object, lm: CausalLM, step: Step, slots: int, capacity: int, like: Sequence[Tensor], name: str
) -> StepGraphs:
    """Rings and graphs for a decoder, given back when the decoder is no more.

    Args:
        borrower: the decoder. lm: its model. step: what is captured. slots: N. capacity: C.
        like: keys and values of every layer.
        name: tells steps of one model apart.
    """
    # A model that was moved has its parameters elsewhere, where its graphs do not look.
    key = (name, slots, capacity, tuple(parameter.data_ptr() for parameter in lm.model.parameters()))
    waiting = lm.remember(_waiting_graphs)
    found = next((graphs for known, graphs in waiting if known == key), None)
    if found is None:
        found = StepGraphs(step, slots, capacity, like)
    else:
        waiting[:] = [(known, graphs) for known, graphs in waiting if graphs is not found]
    weakref.finalize(borrower, _give_back, waiting, key, found).atexit = False
    return found


def _give_back(waiting: list[tuple[Key, StepGraphs]], key: Key, graphs: StepGraphs) -> None:
    waiting.append((key, graphs))
    del waiting[:-MAX_WAITING]
