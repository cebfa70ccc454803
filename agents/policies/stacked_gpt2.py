"""S networks of GPT-2's shape at once: their weights stacked, each matrix product one batched product over the seeds.

The shape is that of `transformers.GPT2LMHeadModel`, whose names the weights have, without dropout.

Shapes: S seeds, b sequences a seed, L columns, n tokens a seed, m slots a seed, C columns of the cache, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from lmgym.errors import InvalidArgumentError
from lmgym.models.activations import is_same_function

Weights = Mapping[str, Tensor]  # (S, ...) each, by their names in a GPT2LMHeadModel
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, queries, keys and values (S, n, W) -> (S, n, W)


class Shape(NamedTuple):
    """What a network's weights do not say: its layers, heads, and the epsilon of its layer norms."""

    layers: int
    heads: int
    epsilon: float


def find_shape(model: Any) -> Shape:
    """The shape of a model.

    Raises:
        InvalidArgumentError: for a model that computes anything else than `read_stacked` does.
    """
    if not _is_plain_gpt2(model):
        raise InvalidArgumentError(
            f"`seeds` must be 1 where the policy is no plain GPT-2 in float32, got a {type(model).__name__}: its "
            "weights cannot be stacked. Train one seed after the other: -m seed=0,1,2."
        )
    return Shape(model.config.n_layer, model.config.n_head, model.config.layer_norm_epsilon)


def _is_plain_gpt2(model: Any) -> bool:
    if type(model) is not GPT2LMHeadModel or model.dtype != torch.float32:
        return False
    config = model.config
    unusual = (config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn, config.add_cross_attention)
    gelu = nn.GELU(approximate="tanh")
    is_gelu = all(is_same_function(block.mlp.act, gelu) for block in model.transformer.h)
    return bool(config.scale_attn_weights and not any(unusual) and is_gelu)


def read_stacked(weights: Weights, shape: Shape, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """(S, n, W) hidden states, the input of the head, of tokens (S, n) int64 at positions (S, n) int64."""
    x = _embed(weights["transformer.wte.weight"], ids) + _embed(weights["transformer.wpe.weight"], positions)
    for layer in range(shape.layers):
        block = f"transformer.h.{layer}"
        normed = _normalise(weights, f"{block}.ln_1", shape, x)
        queries, keys, values = _affine(weights, f"{block}.attn.c_attn", normed).chunk(3, dim=-1)
        x = x + _affine(weights, f"{block}.attn.c_proj", attend(layer, queries, keys, values))
        normed = _normalise(weights, f"{block}.ln_2", shape, x)
        inner = nn.functional.gelu(_affine(weights, f"{block}.mlp.c_fc", normed), approximate="tanh")
        x = x + _affine(weights, f"{block}.mlp.c_proj", inner)
    return _normalise(weights, "transformer.ln_f", shape, x)


def head_logits(weights: Weights, hidden: Tensor) -> Tensor:
    """(S, n, V) logits of hidden states (S, n, W); a head that is tied to the embeddings has no weight of its own."""
    head = weights.get("lm_head.weight", weights["transformer.wte.weight"])
    return torch.bmm(hidden, head.transpose(1, 2))


def causal_attention(heads: int, length: int) -> Attend:
    """Attention within sequences of `length` tokens, of which the n tokens of a seed are so many as fit."""

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query, key, value = (_split_heads(x, heads, length) for x in (queries, keys, values))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(queries.shape)

    return attend


class StackedCache:
    """Keys and values of running sequences, (S * m, heads, C, head width) a layer; slot i of seed s is row s * m + i.

    Args:
        weights: of the networks. shape: theirs. ids: (S, m, L) the sequences from column 0, right-padded.
        lengths: (S * m,) their tokens. capacity: C.

    Attributes:
        hidden: (S, m, W) at each slot's newest token.
    """

    def __init__(self, weights: Weights, shape: Shape, ids: Tensor, lengths: Tensor, capacity: int) -> None:
        self._weights = weights
        self._shape = shape
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._capacity = capacity
        self._age = lengths
        self._used = ids.shape[2]  # columns that any slot may have filled
        s, m, length = ids.shape
        positions = torch.arange(length, device=ids.device).expand(s, m, length)
        hidden = read_stacked(weights, shape, ids.flatten(1), positions.flatten(1), self._fill(length))
        last = (lengths - 1).view(s, m) + torch.arange(m, device=ids.device) * length
        self.hidden = take(hidden, last)

    def _fill(self, length: int) -> Attend:
        """Attention over whole sequences, which keeps their keys and values."""
        attend = causal_attention(self._shape.heads, length)

        def attend_and_keep(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            for kept, states in ((self._keys, keys), (self._values, values)):
                split = _split_heads(states, self._shape.heads, length)
                room = split.new_zeros((*split.shape[:2], self._capacity, split.shape[3]))
                room[:, :, :length] = split
                kept.append(room)
            return attend(layer, queries, keys, values)

        return attend_and_keep

    def step(self, tokens: Tensor) -> None:
        """Appends a token (S, m) to every slot."""
        self._used = min(self._used + 1, self._capacity)
        is_seen = torch.arange(self._used, device=tokens.device) <= self._age[:, None]
        rows = torch.arange(len(self._age), device=tokens.device)

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            query, key, value = (_split_heads(x, self._shape.heads, 1) for x in (queries, keys, values))
            self._keys[layer][rows, :, self._age] = key.squeeze(2)
            self._values[layer][rows, :, self._age] = value.squeeze(2)
            mixed = nn.functional.scaled_dot_product_attention(
                query,
                self._keys[layer][:, :, : self._used],
                self._values[layer][:, :, : self._used],
                attn_mask=is_seen[:, None, None, :],
            )
            return mixed.reshape(queries.shape)

        positions = self._age.view(tokens.shape)
        self.hidden = read_stacked(self._weights, self._shape, tokens, positions, attend)
        self._age = (self._age + 1).clamp(max=self._capacity - 1)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (S, m) of the S * m, in this order; rows of a seed stay with it."""
        flat = rows.flatten()
        self._keys = [x[flat] for x in self._keys]
        self._values = [x[flat] for x in self._values]
        self._age = self._age[flat]
        self.hidden = self.hidden.flatten(0, 1)[flat].view(*rows.shape, -1)


def take(states: Tensor, columns: Tensor) -> Tensor:
    """(S, n, W) of states (S, k, W) at columns (S, n)."""
    s, k, width = states.shape
    flat = (columns + torch.arange(s, device=columns.device)[:, None] * k).flatten()
    return states.reshape(s * k, width).index_select(0, flat).view(s, -1, width)


def _embed(table: Tensor, ids: Tensor) -> Tensor:
    """(S, n, W) rows of tables (S, k, W) by ids (S, n)."""
    s, k, width = table.shape
    return nn.functional.embedding(ids + torch.arange(s, device=ids.device)[:, None] * k, table.reshape(s * k, width))


def _affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    return torch.baddbmm(weights[f"{name}.bias"].unsqueeze(1), x, weights[f"{name}.weight"])


def _normalise(weights: Weights, name: str, shape: Shape, x: Tensor) -> Tensor:
    normed = nn.functional.layer_norm(x, x.shape[-1:], eps=shape.epsilon)
    return torch.addcmul(weights[f"{name}.bias"].unsqueeze(1), normed, weights[f"{name}.weight"].unsqueeze(1))


def _split_heads(x: Tensor, heads: int, length: int) -> Tensor:
    """(S * b, heads, L, head width) of (S, b * L, W)."""
    return x.reshape(-1, length, heads, x.shape[-1] // heads).transpose(1, 2)
