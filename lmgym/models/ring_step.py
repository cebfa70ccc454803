"""One decoding step of a model over a ring of keys and values.

The ring: every slot writes the keys and values of its newest token into the same column, `clock % C`; a slot that has
seen n tokens attends to the n newest columns. Positions reach the model through `position_ids`, so the column of a key
does not matter.

Shapes: N slots, C ring columns, V vocabulary, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from lmgym.models.caches import cache_keyword
from lmgym.models.causal import CausalLM, legal_logits
from lmgym.models.lean.find import find_lean
from lmgym.models.lean.fused import AlignedHead, FusedStep, align_head, find_fused
from lmgym.models.lean.transformer import Transformer


class _RingLayer(CacheLayerMixin):
    """Keys and values (N, heads, C, head width) of one layer; a forward writes one column and reads all."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.column = column
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing, because the decoder allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:  # its name in the oldest transformers that we support
        return self.keys.shape[2]


class RingStep(nn.Module):
    """One decoding step of the unmodified model over a ring."""

    def __init__(self, lm: CausalLM, keep_hidden: bool) -> None:
        super().__init__()
        self.model = lm.model
        # Not a method of `lm`, which remembers its steps: neither must keep the other alive.
        self._legal_logits = _legal_logits(lm)
        self._keep_hidden = keep_hidden
        self._dtype = lm.dtype
        self._cache_keyword = cache_keyword(lm.model)
        # Only sdpa takes a bool mask; the others add theirs to the attention scores.
        self._bool_mask = lm.model.config.get_text_config()._attn_implementation == "sdpa"

    def sync(self) -> None:
        """Does nothing: it reads the model's own weights."""

    def forward(self, tokens: Tensor, age: Tensor, column: Tensor, *rings: Tensor) -> tuple[Tensor, ...]:
        """Appends tokens (N,) to slots that have seen age (N,) tokens, in ring column (1,).

        Args:
            tokens, age, column: int64. rings: keys and values (N, heads, C, width) of every layer, written in place.

        Returns:
            logits (N, V), and the hidden state (N, D) where it is kept.
        """
        cache = Cache(layers=[_RingLayer(k, v, column) for k, v in zip(rings[::2], rings[1::2], strict=True)])
        capacity = rings[0].shape[2]
        columns_ago = (column - torch.arange(capacity, device=column.device)) % capacity
        mask = (columns_ago <= age[:, None])[:, None, None, :]
        if not self._bool_mask:
            mask = torch.where(mask, 0.0, torch.finfo(self._dtype).min).to(self._dtype)
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=age[:, None],
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=self._keep_hidden,
            **{self._cache_keyword: cache},
        )
        logits = self._legal_logits(out.logits[:, -1])
        return (logits, out.hidden_states[-1][:, -1]) if self._keep_hidden else (logits,)


def _legal_logits(lm: CausalLM) -> Callable[[Tensor], Tensor]:
    """`lm.legal_logits`, by ids on the device: a CUDA graph cannot copy them there."""
    holes = torch.tensor(lm.holes, dtype=torch.int64, device=lm.device)
    return partial(legal_logits, vocab_size=lm.vocab_size, holes=holes, temperature=lm.temperature)


class LeanStep:
    """The same step by the model's lean forward (`lmgym/models/lean`): fewer calls, which small models consist of."""

    def __init__(self, lm: CausalLM, lean: Transformer, keep_hidden: bool) -> None:
        self._lean = lean
        self._fused = lm.remember(_find_fused)
        self._head = lm.remember(_align_head)
        self._vocab_size = lm.vocab_size
        self._legal_logits = _legal_logits(lm)
        self._keep_hidden = keep_hidden

    def sync(self) -> None:
        """Takes over what training has changed in weights that it keeps copies of; a graph does not."""
        if self._head is not None:
            self._head.sync()

    def __call__(self, tokens: Tensor, age: Tensor, column: Tensor, *rings: Tensor) -> tuple[Tensor, ...]:
        """As `RingStep.forward`."""
        hidden = (self._fused or self._lean).step(tokens, age, column, rings)
        head = self._head
        logits = self._lean.logits(hidden, self._vocab_size) if head is None else head(hidden)
        logits = self._legal_logits(logits)
        return (logits, hidden) if self._keep_hidden else (logits,)


def _find_fused(lm: CausalLM) -> FusedStep | None:
    lean = lm.remember(find_lean)
    return None if lean is None else find_fused(lean)


def _align_head(lm: CausalLM) -> AlignedHead | None:
    lean = lm.remember(find_lean)
    return None if lean is None else align_head(lean.head, lm.vocab_size)


def make_step(lm: CausalLM, keep_hidden: bool) -> RingStep | LeanStep:
    """The step by the lean forward of the model, or as the model is where there is none."""
    lean = lm.remember(find_lean)
    return RingStep(lm, keep_hidden) if lean is None else LeanStep(lm, lean, keep_hidden)
