"""The forward of a module as a recorded graph, which runs without the module's Python.

torch never frees what `torch.jit.trace` has recorded: a graph of a small GPT-2 holds 4 MB for the life of the process,
also after its model is gone. Therefore the weights are inputs of a graph here, and one graph serves all modules that
differ in their weights alone: a process that trains a hundred policies records once.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from pickle import Pickler, PicklingError  # to write, never to load
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

Forward = Callable[..., tuple[Tensor, ...]]
Example = Callable[[int, int], tuple[Tensor, ...]]

_RECORDED_SIZES = (2, 5)  # of the example that is recorded
_CHECKED_SIZES = ((1, 7), (3, 4))  # of the examples at which a graph must give what the module gives
_RECORDING_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)

_graphs: dict[bytes, Forward] = {}  # by `_fingerprint` of the module; torch holds every graph for ever anyway


@torch.no_grad()
def record(module: nn.Module, example: Example) -> Forward | None:
    """The module's forward as a graph that takes the module's weights at each call, and so follows their training.

    Args:
        module: its forward takes tensors and returns a tuple of tensors.
        example: makes inputs of two sizes, which may be written in place.

    Returns:
        The graph, or None where the module cannot be recorded, or gives something else at other sizes.
    """
    weights = _Weights(module)
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # recording looks at every attribute of a model, and some of them warn
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fingerprint = _fingerprint(module, weights)
            graph = _graphs.get(fingerprint)
            if graph is None or not _agrees(module, weights.bind(graph), example):
                graph = _trace(module, weights, example(*_RECORDED_SIZES))
                if not _agrees(module, weights.bind(graph), example):
                    return None
                if fingerprint:
                    _graphs[fingerprint] = graph
    except _RECORDING_ERRORS:
        return None
    finally:
        hf_logging.set_verbosity(level)
    return weights.bind(graph)


class _Weights:
    """The parameters and buffers of a module; a tied one is held under several names, and is listed once.

    Attributes:
        holders: for each weight, the dicts of modules that hold it, with its name there.
    """

    def __init__(self, module: nn.Module) -> None:
        holders: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        holders.setdefault(id(tensor), []).append((tensors, name))
        self.holders = list(holders.values())

    def values(self) -> list[Tensor]:
        """The present tensors."""
        return [tensors[name] for ((tensors, name), *_) in self.holders]

    def replace(self, values: Sequence[Tensor]) -> None:
        """Puts other tensors in place of the weights."""
        for value, holders in zip(values, self.holders, strict=True):
            for tensors, name in holders:
                tensors[name] = value

    def bind(self, graph: Forward) -> Forward:
        """A graph whose first inputs are these weights, as a function of the rest."""

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                return graph(*self.values(), *inputs)

        return run


def _trace(module: nn.Module, weights: _Weights, inputs: tuple[Tensor, ...]) -> Forward:
    own = weights.values()
    recorded = [module]
    count = len(own)

    def forward(*both: Tensor) -> tuple[Tensor, ...]:
        _Weights(recorded[0]).replace(both[:count])
        return recorded[0](*both[count:])

    try:
        graph: Forward = torch.jit.trace(forward, (*own, *inputs), check_trace=False)
    finally:
        weights.replace(own)
        recorded.clear()  # a graph holds the function that it was recorded from, and must not hold the module
    return graph


def _agrees(module: nn.Module, recorded: Forward, example: Example) -> bool:
    """Whether a graph gives what the module itself gives, at sizes other than those of the recording."""
    for sizes in _CHECKED_SIZES:
        for found, expected in zip(recorded(*example(*sizes)), module(*example(*sizes)), strict=True):
            if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5):
                return False
    return True


class _Description(Pickler):
    """Writes everything that a module holds, but of its weights only their order, shapes, dtypes and devices."""

    def __init__(self, file: io.BytesIO, weights: _Weights) -> None:
        super().__init__(file)
        self._order = {id(tensor): i for i, tensor in enumerate(weights.values())}

    def persistent_id(self, x: Any) -> Any:
        if isinstance(x, Tensor) and id(x) in self._order:
            return self._order[id(x)], tuple(x.shape), str(x.dtype), str(x.device)
        return None


def _fingerprint(module: nn.Module, weights: _Weights) -> bytes:
    """A digest that is equal for modules that differ in their weights alone; a graph has other numbers as constants.

    It is empty for a module that cannot be pickled, which then shares its graph with no other.
    """
    file = io.BytesIO()
    try:
        _Description(file, weights).dump(module)
    except (PicklingError, TypeError, AttributeError):
        return b""
    return hashlib.sha256(file.getvalue()).digest()
