"""A decoder-only transformer out of the parts in `parts.py`.

Shapes: B rows, L columns, n = B * L tokens, D width of the model, H query heads, G key-value heads, h width of a head,
V vocabulary, N slots, C ring columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmgym.models.lean.parts import MLP, GatedMLP, Linear, Norm, Rope, rotate
from lmgym.models.lean.products import affine

Heads = tuple[Tensor, Tensor, Tensor]  # queries (n, H, h), keys (n, G, h), values (n, G, h)
Attend = Callable[[int, Heads], Tensor]  # what a layer's queries find (n, H * h), by the layer's number


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        project: x (n, D) -> heads. scaling: what queries times keys are multiplied by.
        out: (n, H * h) -> (n, D).
        parallel: whether the MLP reads what the attention reads, and not what it has written.
    """

    attention_norm: Norm
    project: Callable[[Tensor], Heads]
    scaling: float
    out: Linear
    mlp_norm: Norm
    mlp: MLP | GatedMLP
    parallel: bool = False

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Heads:
        """What attention reads of x (n, D) before the layer."""
        queries, keys, values = self.project(self.attention_norm(x))
        if angles is not None:
            queries = rotate(queries, *angles)
            keys = rotate(keys, *angles)
        return queries, keys, values

    def finish(self, x: Tensor, found: Tensor) -> Tensor:
        """(n, D) after the layer, of x (n, D) before it and of what its queries found (n, H * h)."""
        attended = _add(self.out(found), x)
        if self.parallel:
            return _add(self.mlp(self.mlp_norm(x)), attended)
        return _add(self.mlp(self.mlp_norm(attended)), attended)


@dataclass(frozen=True)
class Transformer:
    """The model, without dropout.

    Attributes:
        tokens, positions: the dicts with the "weight" of the embeddings; None where positions are rotary.
        head: the LM head; None of a trunk alone.
        window: the longest sequence that it attends to all of, in tokens; None without a limit.
        padding_idx: the token whose embedding takes no gradient, as in `nn.Embedding`.
    """

    tokens: dict[str, Any]
    positions: dict[str, Any] | None
    rope: Rope | None
    layers: Sequence[Layer]
    norm: Norm
    head: Linear | None
    window: int | None = None
    padding_idx: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Transformer:
        return self  # the weights are the model's, which is not copied by accident either

    def run(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(n, D) hidden states after the last norm, of tokens (n,) at positions (n,)."""
        x, angles = self.embed(ids, positions)
        for i, layer in enumerate(self.layers):
            x = layer.finish(x, attend(i, layer.heads(x, angles)))
        return self.norm(x)

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(n, D) embeddings of tokens (n,) at positions (n,), and the angles of the positions where they are rotary."""
        x = F.embedding(ids, self.tokens["weight"], self.padding_idx)
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions["weight"])
        return x, None if self.rope is None else self.rope.angles(positions, x.dtype)

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """(n, V) of hidden states (n, D): the head's first V columns."""
        assert self.head is not None
        weight = self.head.weight
        bias = self.head.parameters["bias"]
        if weight.shape[1] > vocab_size:
            weight = weight[:, :vocab_size]
            bias = None if bias is None else bias[:vocab_size]
        return affine(hidden, weight, bias)

    def read(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Reads whole sequences.

        Args:
            ids: (B, L) int64. mask: (B, L) bool, True on tokens; None where all padding is on the right.

        Returns:
            hidden (B, L, D), and the keys and values (B, G, L, h) of every layer.
        """
        b, length = ids.shape
        columns = torch.arange(length, device=ids.device)
        states: list[Tensor] = []
        bias: Tensor | None = None
        positions = columns.expand(b, length)
        if mask is not None:
            positions = (mask.to(torch.int64).cumsum(-1) - 1).clamp_(min=0)
            # A column sees itself also where it is padding: a row of nothing but -inf has no softmax.
            seen = mask[:, None, None, :] & (columns[:, None] >= columns) | (columns[:, None] == columns)
            bias = _as_bias(seen, self.tokens["weight"].dtype)

        def attend(i: int, heads: Heads) -> Tensor:
            queries, keys, values = (x.view(b, length, -1, x.shape[-1]).transpose(1, 2) for x in heads)
            states.extend((keys, values))
            found = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=bias,
                is_causal=bias is None,
                scale=self.layers[i].scaling,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
            return found.transpose(1, 2).reshape(b * length, -1)

        return self.run(ids.reshape(-1), positions.reshape(-1), attend).view(b, length, -1), states

    def step(self, tokens: Tensor, age: Tensor, column: Tensor, rings: Sequence[Tensor]) -> Tensor:
        """(N, D) hidden states of tokens (N,) that are appended to slots, as `RingStep.forward` does."""
        capacity = rings[0].shape[2]
        ago = (column - torch.arange(capacity, device=column.device)) % capacity
        groups = rings[0].shape[1]
        seen = (ago <= age.unsqueeze(1))[:, None, None, :].expand(-1, groups, -1, -1)
        bias = _as_bias(seen, rings[0].dtype)

        def attend(i: int, heads: Heads) -> Tensor:
            queries, keys, values = heads
            # The heads of a group stand where queries stand: they look at the same keys.
            queries = queries.view(len(tokens), groups, -1, keys.shape[-1])
            found = attend_once(
                queries,
                rings[2 * i].index_copy_(2, column, keys.unsqueeze(2)),
                rings[2 * i + 1].index_copy_(2, column, values.unsqueeze(2)),
                bias,
                self.layers[i].scaling,
            )
            return found.reshape(len(tokens), -1)

        return self.run(tokens, age, attend)


def attend_once(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """What a few queries find in many keys.

    Args:
        queries: (N, G, g, h). keys, values: (N, G, C, h). bias: (N, G, 1, C). scaling: of the scores.

    Returns:
        (N, G, g, h).
    """
    if queries.device.type != "cpu" or queries.dtype != torch.float32:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scaling)
    # On a CPU two plain products are up to four times as fast for one query.
    scores = torch.baddbmm(bias.flatten(0, 1), queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view_as(queries)


def _add(update: Tensor, x: Tensor) -> Tensor:
    """x + update in the type of x, which is finer under autocast; otherwise in the memory of the update."""
    return update.add_(x) if update.dtype == x.dtype else x + update


def _as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where a column is seen, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
