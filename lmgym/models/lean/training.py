"""The lean forward of an optimiser step, with gradients: only what is read is computed.

Padding goes through no layer: products are over the tokens alone, and only attention sees rows of one length. The last
layer goes on from its attention with the positions that are read; those of a prompt are mostly not.

Shapes: B rows, L columns, m tokens, n positions that are read, D width of the model, H heads, h width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmgym.models.lean.transformer import Layer, Transformer


def read_at(lean: Transformer, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Hidden states after the last norm at chosen positions of sequences; differentiable.

    Args:
        lean: the model.
        ids: (B, L) int64, sequences from column 0, right-padded.
        rows: (n,) int64. columns: (n,) int64.

    Returns:
        (n, D).
    """
    b, length = ids.shape
    read = rows * length + columns
    tokens = _find_tokens(b, length, rows, columns)
    x, angles = lean.embed(ids.flatten()[tokens], tokens % length)
    for layer in lean.layers[:-1]:
        x = layer.finish(x, _attend(layer, x, angles, tokens, b, length)[tokens])
    last = lean.layers[-1]
    found = _attend(last, x, angles, tokens, b, length)
    order = torch.empty(b * length, dtype=torch.int64, device=ids.device)
    order[tokens] = torch.arange(len(tokens), device=ids.device)
    return lean.norm(last.finish(x[order[read]], found[read]))


def _find_tokens(b: int, length: int, rows: Tensor, columns: Tensor) -> Tensor:
    """(m,) flat positions in (B, L) of what is read or comes before it in its row, in their order."""
    last = torch.full((b,), -1, dtype=torch.int64, device=rows.device).scatter_reduce_(0, rows, columns, "amax")
    is_token = torch.arange(length, device=rows.device) <= last[:, None]
    return is_token.flatten().nonzero().squeeze(1)


def _attend(
    layer: Layer, x: Tensor, angles: tuple[Tensor, Tensor] | None, tokens: Tensor, b: int, length: int
) -> Tensor:
    """(B * L, H * h) what the queries of tokens find, at the tokens' flat positions (m,)."""
    heads = layer.heads(x, angles)
    with torch.autocast("cpu", enabled=False):  # its attention in bfloat16 takes ten times as long
        queries, keys, values = (
            _spread(part.to(x.dtype), tokens, b * length).view(b, length, *part.shape[1:]).transpose(1, 2)
            for part in heads
        )
        found = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=layer.scaling, enable_gqa=queries.shape[1] != keys.shape[1]
        )
    return found.transpose(1, 2).reshape(b * length, -1)


def _spread(x: Tensor, positions: Tensor, count: int) -> Tensor:
    """(count, ...) x (m, ...) at its positions (m,), and 0 elsewhere."""
    if len(positions) == count:
        return x
    return x.new_zeros(count, *x.shape[1:]).index_put((positions,), x)
