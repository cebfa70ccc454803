"""The forward of optimiser steps of one trunk, by what is quickest where its weights are.

On a CPU padding goes through no layer. On a GPU sequences keep their padding, because to leave it out takes a look at
it that all work waits for; and what an optimiser step reads runs as CUDA graphs.

Shapes: B rows, L columns, n positions that are read, D width of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmgym.models.lean.graphs import TrunkGraphs
from lmgym.models.lean.training import read_at
from lmgym.models.lean.transformer import Transformer

RECOMPUTES = "recomputes_in_backward"  # an attribute of the classes of layers that run again


class TrainedTrunk:
    """A trunk that learns.

    Args:
        lean: its forward. trunk: the Hugging Face model whose weights that reads.
    """

    def __init__(self, lean: Transformer, trunk: nn.Module) -> None:
        self.lean = lean
        self._recomputes = any(is_recomputing(module) for module in trunk.modules())
        self.graphs = TrunkGraphs(lean, trunk, self._recomputes)

    def read_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Hidden states after the last norm at chosen positions; None where the model must run as it is.

        Args:
            ids: (B, L) int64, sequences from column 0, right-padded.
            rows: (n,) int64. columns: (n,) int64.

        Returns:
            (n, D).
        """
        if self.lean.window is not None and ids.shape[1] > self.lean.window:
            return None
        hidden = self.graphs.read_at(ids, rows, columns)
        if hidden is None and not (self._recomputes and torch.is_grad_enabled()):
            return read_here(self.lean, ids, rows, columns)
        return hidden


def is_recomputing(layer: nn.Module) -> bool:
    """Whether a layer has been told to run again in the backward pass (`agents.policies.recomputing`)."""
    return getattr(type(layer), RECOMPUTES, False)


def read_here(lean: Transformer, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same without graphs; differentiable as often as the operations of the device are."""
    if ids.device.type == "cpu":
        return read_at(lean, ids, rows, columns)
    return lean.read(ids)[0][rows, columns]
