"""Decoding steps on a GPU as CUDA graphs: one launch a token, where the forward of a model is hundreds.

A graph replays its kernels on the addresses that it was captured with, so the rings of keys and values must not move.
They belong to `StepGraphs`, which decoders borrow one after the other and give back. The graphs read the model's own
parameters, and follow their training. What is captured has static shapes: as many slots as are in use, and the columns
of the rings up to one of eight steps; there is one graph for each such size that comes up.

Shapes: N slots, n of them in use, C ring columns, c of them in use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from lmgym.models.causal import CausalLM
from lmgym.models.drawing import Drawing
from lmgym.models.graph_pool import GraphPool, Run

Step = Callable[..., tuple[Tensor, ...]]
Key = tuple[Hashable, ...]

MAX_WAITING = 2  # rings of a model that wait for their next decoder
_MAX_DRAWINGS = 2  # that rings keep graphs for
_COLUMNS = 32  # rings have a multiple of this; attention with a mask is quickest at multiples of 8
_MAX_STEPS = 8  # numbers of columns that a ring is read at


def round_up_capacity(columns: int) -> int:
    """How many columns a ring has that needs so many: a multiple of 32."""
    return columns + -columns % _COLUMNS


def round_up_columns(used: int, capacity: int) -> int:
    """How many columns of a ring are read where so many are in use: one of at most eight numbers."""
    step = round_up_capacity(-(-capacity // _MAX_STEPS))
    return min(used + -used % step, capacity)


class StepGraphs:
    """Rings for N slots, and a graph of the step for each size that it was run with.

    Args:
        step: maps tokens (n,), age (n,), column (1,) and rings (n, heads, c, width), written in place, to outputs.
        slots: N. longest: the longest sequence a slot will hold, in tokens.
        like: keys and values (any, heads, any, width) of every layer, for the shapes of the rings.

    Attributes:
        rings: of every layer (N, heads, C, width).
        age: (N,) int64 tokens that each slot has seen. column: (1,) int64, the one that is written next.
    """

    def __init__(self, step: Step, slots: int, longest: int, like: Sequence[Tensor]) -> None:
        device = like[0].device
        capacity = round_up_capacity(longest)
        self._step = step
        self._longest = longest
        self._capacity = capacity
        self.rings = [x.new_zeros((slots, x.shape[1], capacity, x.shape[3])) for x in like]
        self.age = torch.zeros(slots, dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._pool = GraphPool(device)
        self._steps: dict[Key, Run] = {}
        self._drawings: dict[Key, tuple[Drawing, dict[Key, Run]]] = {}

    @torch.inference_mode()
    def run(self, tokens: Tensor, columns: int) -> tuple[Tensor, ...]:
        """The step for the first n slots, to which tokens (n,) are appended.

        Args:
            tokens: (n,). columns: c, the one that is written included.

        Returns:
            What the step returns, in tensors of their own.
        """
        n = len(tokens)
        self._tokens[:n].copy_(tokens)
        key = (n, columns)
        if key not in self._steps:
            state = [self.age, self.column]
            self._steps[key] = self._pool.capture(lambda: self._advance(self._tokens[:n], columns), state)
        return tuple(x.clone() for x in self._steps[key]())

    def _advance(self, tokens: Tensor, columns: int) -> tuple[Tensor, ...]:
        """A forward, after which the slots are a token older."""
        age = self.age[: len(tokens)]
        rings = [ring[: len(tokens), :, :columns] for ring in self.rings]
        outputs = self._step(tokens, age, self.column, *rings)
        age.add_(1).clamp_(max=self._longest - 1)
        self.column.add_(1).remainder_(self._capacity)
        return outputs

    def take_over(self, drawing: Drawing, value_head: nn.Module | None) -> Drawing:
        """A drawing with the contents of this one, in tensors that graphs know where there are some."""
        weights = [] if value_head is None else [weight.data_ptr() for weight in value_head.parameters()]
        key = (drawing.key, *weights)
        if key in self._drawings:
            known, _ = self._drawings[key]
            known.take_over(drawing)
            return known
        while len(self._drawings) >= _MAX_DRAWINGS:
            self._drawings.pop(next(iter(self._drawings)))
        self._drawings[key] = (drawing, {})
        return drawing

    @torch.inference_mode()
    def draw(self, drawing: Drawing, value_head: nn.Module | None, columns: int) -> None:
        """The step for the newest tokens of a drawing that was taken over, and the draw of the next ones.

        Args:
            drawing: its first n slots are those of the rings.
            value_head: gives estimates from hidden states, which the step must then return. columns: as for `run`.
        """
        graphs = next(graphs for known, graphs in self._drawings.values() if known is drawing)
        key = (drawing.size, columns, drawing.sampler.is_greedy(drawing.position))
        if key not in graphs:
            state = [self.age, self.column, *drawing.state()]
            graphs[key] = self._pool.capture(lambda: self._advance_and_draw(drawing, value_head, columns), state)
        graphs[key]()
        drawing.position += 1

    def _advance_and_draw(self, drawing: Drawing, value_head: nn.Module | None, columns: int) -> tuple[Tensor, ...]:
        logits, *hidden = self._advance(drawing.tokens[: drawing.size], columns)
        estimates = None if value_head is None else value_head(hidden[0].float()).squeeze(-1)
        drawing.draw(logits, estimates, drawing.column)
        drawing.column.add_(1)
        return ()


def _waiting_graphs(lm: CausalLM) -> list[tuple[Key, StepGraphs]]:
    """An empty list, for graphs whose decoder is no more."""
    return []


def borrow_graphs(
    borrower: object, lm: CausalLM, step: Step, slots: int, longest: int, like: Sequence[Tensor], name: str
) -> StepGraphs:
    """Rings and graphs for a decoder, given back when the decoder is no more.

    Args:
        borrower: the decoder. lm: its model. step: what is captured. slots: N.
        longest: sequence that a slot will hold, in tokens. like: keys and values of every layer.
        name: tells steps of one model apart.
    """
    # A model that was moved has its parameters elsewhere, where its graphs do not look.
    key = (name, slots, longest, tuple(parameter.data_ptr() for parameter in lm.model.parameters()))
    waiting = lm.remember(_waiting_graphs)
    found = next((graphs for known, graphs in waiting if known == key), None)
    if found is None:
        found = StepGraphs(step, slots, longest, like)
    else:
        waiting[:] = [(known, graphs) for known, graphs in waiting if graphs is not found]
    weakref.finalize(borrower, _give_back, waiting, key, found).atexit = False
    return found


def _give_back(waiting: list[tuple[Key, StepGraphs]], key: Key, graphs: StepGraphs) -> None:
    waiting.append((key, graphs))
    del waiting[:-MAX_WAITING]
