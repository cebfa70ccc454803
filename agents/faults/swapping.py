"""Weights that are others for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def swapped(parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> Iterator[None]:
    """The block in which parameters have other numbers; after it they have their own again, to the bit."""
    own = [parameter.detach().clone() for parameter in parameters]
    _assign(parameters, others)
    try:
        yield
    finally:
        _assign(parameters, own)


@torch.no_grad()
def _assign(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
