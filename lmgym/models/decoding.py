"""Next-token logits for many sequences at once, whatever the model.

`RingDecoder` caches keys and values (`ring.py`). Not every model can be driven so (sliding windows, ALiBi):
`make_decoder` compares it with a plain forward once a model, and takes `PlainDecoder` where the two differ. A
`MarkovLM` needs neither: `TableDecoder` looks its rows up.

Shapes: N slots, W prompt columns, V vocabulary, D width of the model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lmgym.models.causal import CausalLM, token_log_probs
from lmgym.models.markov import MarkovLM
from lmgym.models.padding import compact_left, pad_left
from lmgym.models.ring import RingDecoder, TokenIds
from lmgym.models.sampling import check_finite_log_probs

_PROBE_TOLERANCE = 1e-3  # of the largest logit; ring and plain forward agree to 1e-6 in float32
_HALF_PRECISION_FACTOR = 64  # by which the tolerance is larger in half precision
_WINDOW_NAMES = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")  # in configs, tokens
_PROBE_STEPS = 12
_PROBE_PROMPT = 5  # tokens


class Decoder(Protocol):
    """Slots of running sequences, as a policy drives them."""

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


class PromptDecoder(Decoder, Protocol):
    """Slots of running sequences, as an environment drives them: each starts and ends at a time of its own."""

    def start(self, sequences: Mapping[int, TokenIds], upcoming: Callable[[int], TokenIds] | None = None) -> None:
        """Restarts slots from a sequence each.

        Args:
            sequences: token ids by slot, one at least each.
            upcoming: the sequence that a slot will most likely start from next, which a decoder may read ahead.
        """

    def log_probs(self, tokens: Tensor) -> Tensor:
        """(N,) float32 nats of each slot's next token being this one."""


class PlainDecoder:
    """A full forward over the history of every slot with each token: slow, and right for every causal model."""

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

    def start(self, sequences: Mapping[int, TokenIds], upcoming: Callable[[int], TokenIds] | None = None) -> None:
        """Restarts slots from token ids by slot; reading ahead would spare nothing."""
        slots = torch.tensor(list(sequences), device=self._lm.device)
        ids, mask = pad_left(list(sequences.values()), self._lm.pad_token_id)
        self.begin(slots, ids.to(self._lm.device), mask.to(self._lm.device))

    def log_probs(self, tokens: Tensor) -> Tensor:
        """(N,) float32 nats of each slot's next token being this one."""
        with torch.inference_mode():
            return token_log_probs(self.logits, tokens)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot: one forward over everything."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self._lengths = self._lengths.clamp(max=self._ids.shape[1] - 1)
        self._ids[rows, self._lengths] = tokens
        self._lengths = self._lengths + 1
        self._read()

    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order."""
        self._ids = self._ids[slots]
        self._lengths = self._lengths[slots]
        self.logits = self.logits[slots]
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
        self._trunk = lm.model.trunk
        self._head = lm.model.lm_head
        self._keep_hidden = keep_hidden
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
        """(N,) float32 nats of each slot's next token being this one, without the probabilities of all others."""
        log_probs: Tensor = self._head.log_probs(self._trunk.hidden(self._contexts), tokens, self._legal)
        return log_probs

    @torch.inference_mode()
    def begin(self, slots: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Restarts slots (n,) from sequences (n, W), left-padded."""
        recent = ids[:, -2:].masked_fill(~mask[:, -2:].bool(), self._trunk.before)
        self._contexts[slots] = self._trunk.contexts(recent)[:, -1]

    def start(self, sequences: Mapping[int, TokenIds], upcoming: Callable[[int], TokenIds] | None = None) -> None:
        """Restarts slots from token ids by slot, of which a table sees the last two at most."""
        device = self._contexts.device
        ends = torch.tensor([(-1, *ids[-2:])[-2:] for ids in sequences.values()], device=device)
        self.begin(torch.tensor(list(sequences), device=device), ends, ends >= 0)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot."""
        self._contexts = self._trunk.following(self._contexts, tokens)

    @torch.inference_mode()
    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order."""
        self._contexts = self._contexts[slots]


def make_decoder(lm: CausalLM, slots: int, capacity: int, *, keep_hidden: bool = False) -> PromptDecoder:
    """The quickest decoder that is exact for a model; where it is the plain one, with a warning.

    Args:
        lm: the model. slots: N. capacity: the longest sequence a slot will hold, in tokens.
        keep_hidden: whether to keep the input of the LM head.
    """
    if isinstance(lm.model, MarkovLM):
        return TableDecoder(lm, slots, keep_hidden=keep_hidden)
    config = lm.model.config.get_text_config()
    windows = [getattr(config, name, None) for name in _WINDOW_NAMES]
    shortest = min((window for window in windows if isinstance(window, int)), default=capacity)
    if lm.remember(ring_is_exact) and capacity <= shortest:
        return RingDecoder(lm, slots, capacity, keep_hidden=keep_hidden)
    warnings.warn(
        f"{type(lm.model).__name__} cannot be decoded with the ring cache (a sliding window, ALiBi, or a cache of its "
        "own): falling back to a full forward a token, whose cost a token grows with the length.",
        stacklevel=2,
    )
    return PlainDecoder(lm, slots, capacity)


@torch.inference_mode()
def ring_is_exact(lm: CausalLM) -> bool:
    """Drives ragged slots a few times around a small ring, and compares each step with a plain forward.

    Raises:
        NotFiniteError: for a model whose own forward gives no distribution.
    """
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return False
    steps = _PROBE_STEPS if lm.max_positions is None else min(_PROBE_STEPS, lm.max_positions - _PROBE_PROMPT)
    tokens = torch.arange(2 * (8 + steps), device=lm.device).view(2, -1) % lm.vocab_size
    ids = tokens[:, :_PROBE_PROMPT]
    mask = torch.ones(ids.shape, dtype=torch.bool, device=lm.device)
    mask[1, :3] = False
    both = torch.arange(2, device=lm.device)
    ring = RingDecoder(lm, 2, _PROBE_PROMPT + steps // 2, record=False)
    plain = PlainDecoder(lm, 2, _PROBE_PROMPT + steps)
    tolerance = _PROBE_TOLERANCE * (1 if lm.dtype == torch.float32 else _HALF_PRECISION_FACTOR)
    try:
        for decoder in (ring, plain):
            decoder.begin(both, ids, mask)
        for t in range(steps):
            if t == steps // 2:  # slots are restarted one after the other, so that they wrap around the ring's end
                for decoder in (ring, plain):
                    decoder.begin(both[:1], ids[1:], mask[1:])
                    decoder.begin(both[1:], ids[:1], mask[:1])
            # Where the model gives no distribution, that is the fault to report.
            check_finite_log_probs(plain.logits.amax(-1), lm.dtype)
            if not _are_close(ring.logits.float(), plain.logits.float(), tolerance):
                return False
            for decoder in (ring, plain):
                decoder.step(tokens[:, _PROBE_PROMPT + t])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    return True


def _are_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits (n, V) differ by no more than a fraction of the largest; ids of no token are at -inf in both."""
    possible = expected.isfinite()
    gap = (found - expected)[possible].abs().max()
    return bool(gap <= tolerance * expected[possible].abs().max().clamp(min=1.0))
