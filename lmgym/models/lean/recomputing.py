"""A backward pass that runs each layer again, of which only the input was kept (Chen et al. 2016, arXiv 1604.06174).

The gradients of a layer are handed on before those of the layer below it are taken.

Shapes: B rows, L columns, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lmgym.models.lean.transformer import Layer, Transformer

Angles = tuple[Tensor, Tensor] | None
Take = Callable[[Sequence[Tensor | None]], None]


@torch.no_grad()
def read_layers(lean: Transformer, ids: Tensor) -> list[Tensor]:
    """The input (B * L, D) of each layer and of the last norm, of right-padded ids (B, L)."""
    x, angles = lean.embed(ids.flatten(), _positions(ids))
    inputs = [x]
    for layer in lean.layers:
        inputs.append(_run_layer(layer, inputs[-1], angles, ids.shape))
    return inputs


@torch.enable_grad()
def pull_back(
    lean: Transformer,
    ids: Tensor,
    inputs: Sequence[Tensor],
    gradient: Tensor,
    weights: Sequence[Tensor],
    computing: Callable[[], AbstractContextManager[object]],
    take: Take,
) -> None:
    """Takes the gradients of weights, from the last norm to the embeddings.

    Args:
        lean: the forward. ids: (B, L). inputs: what `read_layers` gave.
        gradient: (B * L, D) of the hidden states after the last norm.
        weights: leaves of autograd that the forward reads now.
        computing: makes a block in which the forward computes as it did before.
        take: gets the gradients of the weights piece by piece, each None of a weight that a piece does not read.
    """

    def pull(run: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        with computing():
            above = run(leaf)
        below, *own = torch.autograd.grad(above, [leaf, *weights], gradient, allow_unused=True)
        take(own)
        return below

    with torch.no_grad():
        _, angles = lean.embed(ids.flatten(), _positions(ids))
    gradient = pull(lean.norm, inputs[-1], gradient)
    for layer, x in zip(reversed(lean.layers), reversed(inputs[:-1]), strict=True):
        gradient = pull(partial(_run_layer, layer, angles=angles, shape=ids.shape), x, gradient)
    embedded, _ = lean.embed(ids.flatten(), _positions(ids))
    take(torch.autograd.grad(embedded, weights, gradient, allow_unused=True))


def _positions(ids: Tensor) -> Tensor:
    """(B * L,) the column of each token."""
    return torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0])


def _run_layer(layer: Layer, x: Tensor, angles: Angles, shape: torch.Size) -> Tensor:
    """(B * L, D) after a layer, of x (B * L, D) before it."""
    queries, keys, values = (
        heads.view(*shape, -1, heads.shape[-1]).transpose(1, 2) for heads in layer.heads(x, angles)
    )
    found = F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=layer.scaling, enable_gqa=queries.shape[1] != keys.shape[1]
    )
    return layer.finish(x, found.transpose(1, 2).reshape(len(x), -1))
