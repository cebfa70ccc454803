"""Sums of exponentials along a matrix product or an index, in log space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_matmul(factors: Sequence[Tensor], log_x: Tensor) -> Tensor:
    """log(P @ exp(log_x)) for a P > 0 given as the product of its factors, without over- or underflow.

    The largest entry of each column is subtracted before exp. No sum is then below the smallest entry of P, and so
    none underflows that a float32 table can make.

    Args:
        factors: P (G, n, m), or two factors of it: (G, n, R) and (G, R, m), either with G = 1.
        log_x: (G, m, S) float64, or with G = 1; -inf allowed.

    Returns:
        (G, n, S).
    """
    top = log_x.amax(-2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    total = (log_x - top).exp()
    for factor in reversed(factors):
        total = factor @ total
    return total.log() + top


def log_scatter(log_x: Tensor, index: Tensor) -> Tensor:
    """log of exp(log_x) (..., V, S) added up along the last dimension, each to the entry that index (V, S) says."""
    index = index.expand(log_x.shape)
    top = torch.full_like(log_x, -torch.inf).scatter_reduce_(-1, index, log_x, "amax")
    shift = torch.where(top == -torch.inf, 0.0, top)
    total = torch.zeros_like(log_x).scatter_add_(-1, index, (log_x - shift.gather(-1, index)).exp())
    return total.log() + shift
