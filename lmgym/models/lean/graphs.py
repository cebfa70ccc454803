"""Optimiser steps on a GPU as CUDA graphs: one launch of a trunk forward and one backward, where kernels are hundreds.

Graphs have static shapes, so sequences stand in a few sizes of rows and columns, causal and right-padded: no mask. What
is read of the hidden states is copied out, and only where something was read does a gradient go in. The gradients of
the weights are added up where the graphs write them, and become the `.grad` of the weights.

Shapes: B rows, L columns, n positions that are read, D width of the model.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmgym.models.graph_pool import GraphPool, is_captured
from lmgym.models.lean.recomputing import pull_back, read_layers
from lmgym.models.lean.transformer import Transformer

MAX_TOKENS = 8192  # rows times columns, beyond which kernels take longer than launches, and padding costs more
MAX_SHAPES = 24  # that graphs are kept of
_ROWS = 4  # rows are filled up to a multiple of this
_COLUMNS = 16

Holder = tuple[dict[str, Any], str]  # the dict and the name under which a module keeps a weight

_ADDS_UP = ContextVar("_ADDS_UP", default=False)


@contextmanager
def adding_gradients() -> Iterator[None]:
    """A block in which gradients are taken by `backward` alone, once of each loss, so that graphs may write `.grad`.

    A `.grad` is written over by the next block: copy what is to be kept.
    """
    token = _ADDS_UP.set(True)
    try:
        yield
    finally:
        _ADDS_UP.reset(token)


def round_up_shape(rows: int, columns: int, longest: int | None) -> tuple[int, int]:
    """The smallest shape of a graph that holds B rows of L columns; `longest` is the most columns a model takes."""
    filled = columns + -columns % _COLUMNS
    return rows + -rows % _ROWS, filled if longest is None else min(filled, max(longest, columns))


class TrunkGraphs:
    """The graphs of a trunk, a pair for each shape that came up, and the gradients that they add up.

    Args:
        lean: the forward that is captured. trunk: the Hugging Face model whose weights it reads.
        recomputes: whether layers run again in the backward pass.
    """

    def __init__(self, lean: Transformer, trunk: nn.Module, recomputes: bool = False) -> None:
        self._lean = lean
        self._kind = _RecomputingGraph if recomputes else _Graph
        self._holders = _find_holders(trunk)
        self._longest = None if lean.positions is None else len(lean.positions["weight"])
        self._key: tuple[tuple[int, int], ...] = ()
        self._weights: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._autocast: torch.dtype | None = None
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._running: Callable[[], _Ticket | None] = lambda: None  # the ticket of the last forward

    def read_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Hidden states (n, D) as `training.read_at` gives them; None where graphs may not or cannot run."""
        if not (_ADDS_UP.get() and torch.is_grad_enabled() and is_captured(ids.device)):
            return None
        if self._running() is not None:  # another forward waits for its backward pass, in the same memory
            return None
        weights = _find_weights(self._holders)
        if not all(weight.requires_grad for weight in weights):
            return None
        key = tuple((id(weight), weight.data_ptr()) for weight in weights)
        autocast = _autocast_on(ids.device)
        if key != self._key or autocast != self._autocast:
            self._key = key
            self._autocast = autocast
            self._forget(weights)
        graph = self._find(*ids.shape)
        if graph is None:
            return None
        ticket = _Ticket()
        self._running = weakref.ref(ticket)
        positions = rows * graph.shape[1] + columns
        hidden: Tensor = _Replay.apply(self._anchor, self, graph, ticket, ids, positions)  # type: ignore[no-untyped-call]
        return hidden

    def _forget(self, weights: list[Tensor]) -> None:
        """Starts anew, with weights that are not the ones known, or not where they were."""
        self._graphs.clear()
        self._weights = weights
        self._sums = [torch.zeros_like(weight, memory_format=torch.contiguous_format) for weight in weights]
        self._anchor = torch.zeros((), device=weights[0].device, requires_grad=True)

    def _find(self, rows: int, columns: int) -> _Graph | None:
        """The graphs for B rows of L columns: of their own shape, or of a larger one where there are many."""
        shape = round_up_shape(rows, columns, self._longest)
        if math.prod(shape) > MAX_TOKENS:
            return None
        if shape in self._graphs:
            return self._graphs[shape]
        if len(self._graphs) >= MAX_SHAPES:
            holding = [known for known in self._graphs if known[0] >= rows and known[1] >= columns]
            return self._graphs[min(holding, key=math.prod)] if holding else None
        if all(math.prod(known) < math.prod(shape) for known in self._graphs):
            # What is captured later goes into the memory of what was captured before, where that is as large.
            self._graphs.clear()
            self._pool = GraphPool(self._anchor.device)
        self._graphs[shape] = self._kind(self._lean, self._holders, self._sums, shape, self._pool, self._autocast)
        return self._graphs[shape]

    def add_up(self) -> None:
        """Has the sums be the `.grad` of the weights, with what that was before."""
        pairs = zip(self._weights, self._sums, strict=True)
        waiting = [(weight, total) for weight, total in pairs if weight.grad is not total]
        empty = [total for weight, total in waiting if weight.grad is None]
        if empty:
            torch._foreach_zero_(empty)
        for weight, total in waiting:
            if weight.grad is not None:
                total.copy_(weight.grad)
            weight.grad = total


class _Ticket:
    """Is alive as long as a backward pass may still come."""


class _Graph:
    """The pair of graphs of one shape.

    Args:
        lean: the forward. holders: where its weights are. sums: what their gradients are added to.
        shape: B and L. pool: of the memory. autocast: what products are computed in; None is the type of the weights.
    """

    def __init__(
        self,
        lean: Transformer,
        holders: list[Holder],
        sums: list[Tensor],
        shape: tuple[int, int],
        pool: GraphPool,
        autocast: torch.dtype | None,
    ) -> None:
        self.shape = shape
        self._autocast = autocast
        self._lean = lean
        self._holders = holders
        self._sums = sums
        weight = lean.tokens["weight"]
        self._ids = torch.zeros(shape, dtype=torch.int64, device=weight.device)
        # Of 0, so that runs before the capture add nothing.
        self._gradient = weight.new_zeros((math.prod(shape), lean.norm.parameters["weight"].shape[0]))
        self._computed: Any = None  # what the backward pass goes on from
        self._forward, self._backward = pool.capture_pair(self._run_forward, self._run_backward)
        self._computed = None

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(n, D) hidden states at flat positions (n,) of ids of at most B rows and L columns."""
        # What else stands in the static ids is of other batches, and no position that is read sees it.
        self._ids[: ids.shape[0], : ids.shape[1]].copy_(ids)
        (hidden,) = self._forward()
        return hidden.index_select(0, positions)

    def backward(self, gradient: Tensor, positions: Tensor) -> None:
        """Adds the gradients of the weights to their sums, from those (n, D) of the hidden states."""
        self._gradient.zero_().index_add_(0, positions, gradient)
        self._backward()

    def _computing(self) -> torch.autocast:
        """A block of the forward. A cast of a weight that was kept would not follow the weight."""
        is_coarse = self._autocast is not None
        return torch.autocast(self._ids.device.type, self._autocast, enabled=is_coarse, cache_enabled=False)

    @torch.enable_grad()
    def _run_forward(self) -> tuple[Tensor, ...]:
        with _as_twins(self._holders) as twins, self._computing():
            hidden = self._lean.read(self._ids)[0].flatten(0, 1)
        self._computed = (hidden, twins)
        return (hidden.detach(),)

    def _run_backward(self) -> tuple[Tensor, ...]:
        hidden, twins = self._computed
        self._computed = None
        with torch.autocast(self._ids.device.type, enabled=False):
            gradients = torch.autograd.grad(hidden, twins, self._gradient, materialize_grads=True)
        torch._foreach_add_(self._sums, list(gradients))
        return ()


class _RecomputingGraph(_Graph):
    """The same, with layers that run again in the backward pass."""

    def _run_forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad(), self._computing():
            self._computed = read_layers(self._lean, self._ids)
            return (self._lean.norm(self._computed[-1]),)

    def _run_backward(self) -> tuple[Tensor, ...]:
        inputs = self._computed
        self._computed = None
        with _as_twins(self._holders) as twins, torch.autocast(self._ids.device.type, enabled=False):
            pull_back(self._lean, self._ids, inputs, self._gradient, twins, self._computing, self._add)
        return ()

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        found = [(total, x) for total, x in zip(self._sums, gradients, strict=True) if x is not None]
        torch._foreach_add_([total for total, _ in found], [x for _, x in found])


class _Replay(torch.autograd.Function):
    """What is read of a trunk; its backward pass has written the `.grad` of the weights when it is over."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, graphs: TrunkGraphs, graph: _Graph, ticket: _Ticket, ids: Tensor, positions: Tensor
    ) -> Tensor:
        ctx.graphs = graphs
        ctx.graph = graph
        ctx.ticket = ticket
        ctx.save_for_backward(positions)
        return graph.forward(ids, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        if ctx.ticket is None:
            raise RuntimeError("Graphs of a trunk must go backward once, and a gradient was taken again.")
        (positions,) = ctx.saved_tensors
        ctx.graphs.add_up()
        ctx.graph.backward(gradient, positions)
        ctx.ticket = None
        return (None,) * 6


def _autocast_on(device: torch.device) -> torch.dtype | None:
    """The type that products are computed in now, where that is not the type of the weights."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _find_holders(trunk: nn.Module) -> list[Holder]:
    """Where the modules of a trunk keep its weights."""
    return [
        (module._parameters, name)
        for module in trunk.modules()
        for name, weight in module._parameters.items()
        if weight is not None
    ]


def _find_weights(holders: list[Holder]) -> list[Tensor]:
    """The weights that are in holders now, each once."""
    weights = (parameters[name] for parameters, name in holders)
    return list({id(weight): weight for weight in weights}.values())


@contextmanager
def _as_twins(holders: list[Holder]) -> Iterator[list[Tensor]]:
    """Has other tensors in the memory of the weights stand in their holders, of which autograd knows nothing yet.

    The node that autograd keeps of a weight may be of another stream than a capture's.
    """
    weights = [parameters[name] for parameters, name in holders]
    twins = {id(weight): weight.detach().requires_grad_() for weight in weights}
    for (parameters, name), weight in zip(holders, weights, strict=True):
        parameters[name] = twins[id(weight)]
    try:
        yield list(twins.values())
    finally:
        for (parameters, name), weight in zip(holders, weights, strict=True):
            parameters[name] = weight
