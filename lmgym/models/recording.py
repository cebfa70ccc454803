"""The forward of a module as a recorded graph, which spares the Python of it.

torch never frees what `torch.jit.trace` has recorded: a graph of a small GPT-2 holds 4 MB for the life of the process,
after its model is gone. So the weights are inputs of a graph here, and one graph serves every module that is built
alike: a process that trains a hundred policies records once.
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

_RECORDED = (2, 5)  # the example that is recorded
_CHECKED = ((1, 7), (3, 4))  # the examples at which a graph has to give what the module gives
_UNRECORDABLE = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)

_graphs: dict[bytes, Forward] = {}  # by what `_fingerprint` says of the module


@torch.no_grad()
def record(module: nn.Module, example: Example) -> Forward | None:
    """The module's forward as a graph that reads the module's weights anew at each call, so it follows their training.

    Args:
        module: its forward takes tensors and returns a tuple of tensors.
        example: makes inputs of two sizes, which may be written in place.

    Returns:
        the graph, or None where the module cannot be recorded, or gives something else at other sizes.
    """
    weights = _Weights(module)
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # recording looks at every attribute of a model, and some of them warn
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fingerprint = _fingerprint(module, weights)
            graph = _graphs.get(fingerprint)
            if graph is None or not _agrees(module, weights.bound(graph), example):
                graph = _trace(module, weights, example(*_RECORDED))
                if not _agrees(module, weights.bound(graph), example):
                    return None
                if fingerprint:
                    _graphs[fingerprint] = graph
    except _UNRECORDABLE:
        return None
    finally:
        hf_logging.set_verbosity(level)
    return weights.bound(graph)


class _Weights:
    """The parameters and buffers of a module, by where they are kept: a tied one has several places, and one value."""

    def __init__(self, module: nn.Module) -> None:
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for part in module.modules():
            for kept in (part._parameters, part._buffers):
                for name, tensor in kept.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((kept, name))
        self.places = list(places.values())

    def values(self) -> list[Tensor]:
        """The tensors of now."""
        return [kept[name] for ((kept, name), *_) in self.places]

    def replace(self, values: Sequence[Tensor]) -> None:
        """Puts other tensors in their places."""
        for value, places in zip(values, self.places, strict=True):
            for kept, name in places:
                kept[name] = value

    def bound(self, graph: Forward) -> Forward:
        """A graph whose first inputs are these weights, as a function of the rest."""

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                return graph(*self.values(), *inputs)

        return run


def _trace(module: nn.Module, weights: _Weights, inputs: tuple[Tensor, ...]) -> Forward:
    own, recorded = weights.values(), [module]
    count = len(own)

    def forward(*both: Tensor) -> tuple[Tensor, ...]:
        _Weights(recorded[0]).replace(both[:count])
        return recorded[0](*both[count:])

    try:
        graph: Forward = torch.jit.trace(forward, (*own, *inputs), check_trace=False)
    finally:
        weights.replace(own)
        recorded.clear()  # a graph keeps the function that it was recorded from, and must not keep the module
    return graph


def _agrees(module: nn.Module, recorded: Forward, example: Example) -> bool:
    """Whether a graph gives what the module itself gives at sizes that it was not recorded at."""
    for sizes in _CHECKED:
        for found, expected in zip(recorded(*example(*sizes)), module(*example(*sizes)), strict=True):
            if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5):
                return False
    return True


class _Description(Pickler):
    """Writes what a module is made of, but of its weights only their order, shapes, dtypes and devices."""

    def __init__(self, file: io.BytesIO, weights: _Weights) -> None:
        super().__init__(file)
        self._order = {id(tensor): i for i, tensor in enumerate(weights.values())}

    def persistent_id(self, x: Any) -> Any:
        if isinstance(x, Tensor) and id(x) in self._order:
            return self._order[id(x)], tuple(x.shape), str(x.dtype), str(x.device)
        return None


def _fingerprint(module: nn.Module, weights: _Weights) -> bytes:
    """Equal for modules that differ in their weights alone: a graph holds every other number as a constant.

    Empty for a module that cannot be written, which then shares its graph with no other.
    """
    file = io.BytesIO()
    try:
        _Description(file, weights).dump(module)
    except (PicklingError, TypeError, AttributeError):
        return b""
    return hashlib.sha256(file.getvalue()).digest()
