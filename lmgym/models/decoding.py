"""Next-token logits for many sequences at once, one cached forward a token, on an unmodified Hugging Face model.

The ring: every slot writes the keys and values of its newest token into the same column, `clock % C`; a slot that has
seen n tokens attends to the n newest columns. Positions reach the model through `position_ids`, so the column a key
lies in does not matter, a slot can be restarted at any time by writing a prompt's keys into the columns just behind the
clock, and memory is allocated once. Not every model can be driven so (sliding windows, ALiBi): `make_decoder` probes
a model against a plain forward once, and falls back to `PlainDecoder` where the two disagree.

Shapes: N slots, W prompt columns, C ring columns, V vocabulary, D width of the model.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from lmgym.models.caches import cache_keyword
from lmgym.models.causal import CausalLM, legal_logits
from lmgym.models.cuda_graphs import StepGraphs, borrow_graphs
from lmgym.models.markov import MarkovLM
from lmgym.models.padding import compact_left
from lmgym.models.recording import Forward, record
from lmgym.models.sampling import check_finite_log_probs

_PROBE_TOLERANCE = 1e-3  # of the largest logit; ring and plain forward agree to 1e-6 in float32
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")  # its names in configs, tokens


class Decoder(Protocol):
    """Slots of running sequences."""

    @property
    def logits(self) -> Tensor:
        """(N, V) float, of each slot's next token."""

    @property
    def hidden(self) -> Tensor | None:
        """(N, D) input of the LM head that made them, or None where the decoder does not keep it."""

    def begin(self, slots: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Restarts slots (n,) from sequences (n, W), left-padded, mask True on tokens; any W up to the capacity."""

    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot."""

    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order."""


class _RingLayer(CacheLayerMixin):
    """Keys and values (N, heads, C, head width) of one layer; a forward writes one column and reads all."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.column, self.is_initialized = keys, values, column, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the decoder allocates."""

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

    def get_max_cache_shape(self) -> int:  # what the first of the transformers that we admit call it
        return self.keys.shape[2]


class _RingStep(nn.Module):
    """One decoding step of the unmodified model over a ring: what is run, or recorded once and then run."""

    def __init__(self, lm: CausalLM, keep_hidden: bool) -> None:
        super().__init__()
        self.model = lm.model
        # Not a method of `lm`: a step that is kept for a model must not keep it alive.
        self._legal_logits = partial(legal_logits, vocab_size=lm.vocab_size, holes=lm.holes, temperature=lm.temperature)
        self._keep_hidden, self._dtype = keep_hidden, lm.dtype
        self._cache_keyword = cache_keyword(lm.model)
        # Only sdpa takes a bool mask; the others add theirs to the attention scores.
        self._bool_mask = lm.model.config.get_text_config()._attn_implementation == "sdpa"

    def forward(self, tokens: Tensor, age: Tensor, column: Tensor, *rings: Tensor) -> tuple[Tensor, ...]:
        """Appends tokens (N,) behind slots that have seen age (N,) tokens, in ring column (1,).

        Args:
            tokens, age, column: int64. rings: keys and values (N, heads, C, width) of every layer, written in place.

        Returns:
            logits (N, V), and the hidden state (N, D) where it is kept.
        """
        cache = Cache(layers=[_RingLayer(k, v, column) for k, v in zip(rings[::2], rings[1::2], strict=True)])
        capacity = rings[0].shape[2]
        behind = (column - torch.arange(capacity, device=column.device)) % capacity
        mask = (behind <= age[:, None])[:, None, None, :]
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


_steps: weakref.WeakKeyDictionary[CausalLM, dict[bool, Forward]] = weakref.WeakKeyDictionary()


def _ring_step(lm: CausalLM, keep_hidden: bool) -> Forward:
    """The step as a recorded graph, which spares the Python of a forward; as it is where it cannot be recorded.

    On a GPU it is left as it is: there the decoder captures it (`cuda_graphs.py`).
    """
    steps = _steps.setdefault(lm, {})
    if keep_hidden not in steps:
        step = _RingStep(lm, keep_hidden)
        on_gpu = lm.device.type == "cuda"
        steps[keep_hidden] = step if on_gpu else _recorded(lm, step) or step
    return steps[keep_hidden]


def _recorded(lm: CausalLM, step: _RingStep) -> Forward | None:
    """The step's graph, for any number of slots and any capacity; None where it cannot be recorded."""

    def example(rows: int, capacity: int) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        ids = torch.arange(rows * 2, device=lm.device).view(rows, 2) % lm.vocab_size
        lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_keyword(lm.model): cache})
        rings = []
        for layer in cache.layers:
            for x in (layer.keys, layer.values):
                rings.append(x.new_zeros((rows, x.shape[1], capacity, x.shape[3])))
                rings[-1][:, :, :2] = x
        age = torch.full((rows,), 2, device=lm.device)
        return ids[:, 1], age, torch.tensor([2], device=lm.device), *rings

    return record(step, example)


class Prefilled:
    """Prompts that have been read: their keys, values, next-token logits and lengths, waiting for a slot."""

    def __init__(self, cache: DynamicCache, logits: Tensor, hidden: Tensor | None, lengths: Tensor) -> None:
        self.cache, self.logits, self.hidden, self.lengths = cache, logits, hidden, lengths


class RingDecoder:
    """The ring KV cache. Memory: 2 * layers * N * C * width of all key-value heads, plus the logits N * V.

    Args:
        lm: the model. slots: N. capacity: C, the longest sequence a slot will hold.
        keep_hidden: whether to keep the input of the LM head.
        record: whether steps may run as a recorded graph.
    """

    def __init__(
        self, lm: CausalLM, slots: int, capacity: int, *, keep_hidden: bool = False, record: bool = True
    ) -> None:
        self._lm, self._slots, self._capacity, self._keep_hidden = lm, slots, capacity, keep_hidden
        self._cache_keyword = cache_keyword(lm.model)
        self._step: Forward = _ring_step(lm, keep_hidden) if record else _RingStep(lm, keep_hidden)
        self._captures = record and lm.device.type == "cuda"
        self._graphs: StepGraphs | None = None
        self._rings: list[Tensor] = []
        self._clock = 0
        self._column = torch.zeros(1, dtype=torch.int64, device=lm.device)  # clock % C
        self._age = torch.zeros(slots, dtype=torch.int64, device=lm.device)  # tokens each slot has seen
        self.logits = torch.zeros((slots, lm.vocab_size), dtype=lm.dtype, device=lm.device)
        self.hidden: Tensor | None = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor, mask: Tensor) -> Prefilled:
        """Reads prompts (n, W) without touching the ring."""
        mask, cache = mask.to(torch.int64), DynamicCache()
        out = self._lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_(min=0),
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=self._keep_hidden,
            **{self._cache_keyword: cache},
        )
        hidden = out.hidden_states[-1][:, -1] if self._keep_hidden else None
        return Prefilled(cache, self._lm.legal_logits(out.logits[:, -1]), hidden, mask.sum(-1))

    @torch.inference_mode()
    def insert(self, slots: Tensor, prompts: Prefilled, rows: Tensor) -> None:
        """Starts slots (n,) from rows (n,) of prompts already read."""
        states = [x for layer in prompts.cache.layers for x in (layer.keys, layer.values)]
        if not self._rings:
            self._rings = self._make_rings(states)
        width = states[0].shape[2]
        columns = torch.arange(self._clock - width, self._clock, device=slots.device) % self._capacity
        for ring, state in zip(self._rings, states, strict=True):
            ring[slots[:, None], :, columns[None, :]] = state[rows].transpose(1, 2)
        self._age[slots] = prompts.lengths[rows]
        self.logits[slots] = prompts.logits[rows]
        if prompts.hidden is not None:
            if self.hidden is None:
                self.hidden = prompts.hidden.new_zeros((self._slots, prompts.hidden.shape[-1]))
            self.hidden[slots] = prompts.hidden[rows]

    def _make_rings(self, states: list[Tensor]) -> list[Tensor]:
        """Rings for keys and values like these; on a GPU those of graphs that wait to be used again."""
        if not self._captures:
            return [x.new_zeros((self._slots, x.shape[1], self._capacity, x.shape[3])) for x in states]
        name = f"hidden={self._keep_hidden}"
        self._graphs = borrow_graphs(self, self._lm, self._step, self._slots, self._capacity, states, name)
        return self._graphs.rings

    def begin(self, slots: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Restarts slots (n,) from sequences (n, W), left-padded."""
        self.insert(slots, self.prefill(ids, mask), torch.arange(len(slots), device=slots.device))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot: one forward."""
        if self._graphs is not None:
            self.logits, *hidden = self._graphs.run(tokens, self._age, self._column)
        else:
            self.logits, *hidden = self._step(tokens, self._age, self._column, *self._rings)
        self.hidden = hidden[0] if hidden else None
        self._age = (self._age + 1).clamp_(max=self._capacity - 1)
        self._clock += 1
        self._column = (self._column + 1) % self._capacity

    def rewind(self) -> None:
        """Begins with the first column again, now that every slot is about to be restarted: the same rounding again."""
        self._clock = 0
        self._column = torch.zeros_like(self._column)

    @torch.inference_mode()
    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order."""
        self._slots = len(slots)
        if self._graphs is None:
            self._rings = [ring[slots] for ring in self._rings]
        else:  # graphs read the rings where they are
            for ring in self._rings:
                ring[: self._slots] = ring[slots]
            self._rings = [ring[: self._slots] for ring in self._rings]
        self._age, self.logits = self._age[slots], self.logits[slots]
        self.hidden = None if self.hidden is None else self.hidden[slots]


class PlainDecoder:
    """A full forward over every slot's history a token: slow, and right for every causal model."""

    def __init__(self, lm: CausalLM, slots: int, capacity: int) -> None:
        self._lm = lm
        self._ids = torch.full((slots, capacity), lm.pad_token_id, dtype=torch.int64, device=lm.device)
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=lm.device)
        self.logits = torch.zeros((slots, lm.vocab_size), dtype=lm.dtype, device=lm.device)
        self.hidden: Tensor | None = None

    def begin(self, slots: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Restarts slots (n,) from sequences (n, W), left-padded."""
        self._ids[slots] = self._lm.pad_token_id
        self._ids[slots, : ids.shape[1]] = compact_left(ids, mask)
        self._lengths[slots] = mask.to(torch.int64).sum(-1)
        self._read()

    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot: one forward over everything."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self._lengths = self._lengths.clamp(max=self._ids.shape[1] - 1)
        self._ids[rows, self._lengths] = tokens
        self._lengths = self._lengths + 1
        self._read()

    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order."""
        self._ids, self._lengths, self.logits = self._ids[slots], self._lengths[slots], self.logits[slots]
        self.hidden = None if self.hidden is None else self.hidden[slots]

    @torch.inference_mode()
    def _read(self) -> None:
        rows = torch.arange(len(self._ids), device=self._ids.device)
        used = self._ids[:, : max(int(self._lengths.max()), 1)]
        self.hidden, self.logits = self._lm.response_hidden(used, rows, (self._lengths - 1).clamp(min=0))


class TableDecoder:
    """Slots of a `MarkovLM`, each known by its context: a token costs a look-up, whatever the length.

    Args:
        lm: a model whose `model` is a MarkovLM. slots: N. keep_hidden: whether to keep the input of the LM head.
    """

    def __init__(self, lm: CausalLM, slots: int, *, keep_hidden: bool = False) -> None:
        self._trunk, self._head, self._keep_hidden = lm.model.trunk, lm.model.lm_head, keep_hidden
        self._legal_logits = lm.legal_logits
        self._legal = lm.legal_logits(torch.zeros(self._head.out_features, device=lm.device)).exp()
        self._contexts = torch.zeros(slots, dtype=torch.int64, device=lm.device)

    @property
    @torch.inference_mode()
    def logits(self) -> Tensor:
        """(N, V) float32, of each slot's next token."""
        logits: Tensor = self._legal_logits(self._head(self._trunk.hidden(self._contexts)))
        return logits

    @property
    @torch.inference_mode()
    def hidden(self) -> Tensor | None:
        """(N, D) input of the LM head, or None where it is not kept."""
        return self._trunk.hidden(self._contexts) if self._keep_hidden else None

    @torch.inference_mode()
    def log_probs(self, tokens: Tensor) -> Tensor:
        """(N,) float32 nats of each slot's next token being this one, without the law of all the others."""
        log_probs: Tensor = self._head.log_probs(self._trunk.hidden(self._contexts), tokens, self._legal)
        return log_probs

    @torch.inference_mode()
    def begin(self, slots: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Restarts slots (n,) from sequences (n, W), left-padded."""
        recent = ids[:, -2:].masked_fill(~mask[:, -2:].bool(), self._trunk.before)
        self._contexts[slots] = self._trunk.contexts(recent)[:, -1]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot."""
        self._contexts = self._trunk.following(self._contexts, tokens)

    @torch.inference_mode()
    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order."""
        self._contexts = self._contexts[slots]


_rings: weakref.WeakKeyDictionary[CausalLM, bool] = weakref.WeakKeyDictionary()


def make_decoder(lm: CausalLM, slots: int, capacity: int, *, keep_hidden: bool = False) -> Decoder:
    """A ring decoder, or the plain one with a warning where the ring is not exact for this model (probed once).

    A `MarkovLM` needs neither: its decoder looks rows up.
    """
    if isinstance(lm.model, MarkovLM):
        return TableDecoder(lm, slots, keep_hidden=keep_hidden)
    config = lm.model.config.get_text_config()
    windows = [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]
    if lm not in _rings:
        _rings[lm] = ring_is_exact(lm)
    if _rings[lm] and capacity <= min(windows, default=capacity):
        return RingDecoder(lm, slots, capacity, keep_hidden=keep_hidden)
    warnings.warn(
        f"{type(lm.model).__name__} cannot be decoded with the ring cache (a sliding window, ALiBi, or a cache of its "
        "own): falling back to a full forward a token, whose cost a token grows with the length.",
        stacklevel=2,
    )
    return PlainDecoder(lm, slots, capacity)


@torch.inference_mode()
def ring_is_exact(lm: CausalLM, steps: int = 12) -> bool:
    """Drives ragged slots a few times around a small ring, and compares each step with a plain forward.

    Raises:
        NotFiniteError: for a model whose own forward is no law.
    """
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return False
    if lm.max_positions is not None:
        steps = min(steps, lm.max_positions - 5)
    plain_ids = torch.arange(2 * (8 + steps), device=lm.device).view(2, -1) % lm.vocab_size
    ids, mask = plain_ids[:, :5], torch.ones((2, 5), dtype=torch.bool, device=lm.device)
    mask[1, :3] = False
    both = torch.arange(2, device=lm.device)
    ring, plain = RingDecoder(lm, 2, 5 + steps // 2, record=False), PlainDecoder(lm, 2, 5 + steps)
    try:
        for decoder in (ring, plain):
            decoder.begin(both, ids, mask)
        for t in range(steps):
            if t == steps // 2:  # one slot is restarted in mid-air, so that it wraps around the ring's end
                for decoder in (ring, plain):
                    decoder.begin(both[:1], ids[1:], mask[1:])
                    decoder.begin(both[1:], ids[:1], mask[:1])
            expected, real = plain.logits.float(), plain.logits.isfinite()  # ids that the tokenizer lacks are at -inf
            check_finite_log_probs(expected.amax(-1))  # where the model is no law, that is what is wrong
            gap = (ring.logits.float() - expected)[real].abs().max()
            scale = expected[real].abs().max().clamp(min=1.0)
            if not bool(gap <= _PROBE_TOLERANCE * scale * (1 if lm.dtype == torch.float32 else 64)):
                return False
            for decoder in (ring, plain):
                decoder.step(plain_ids[:, 5 + t])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    return True
