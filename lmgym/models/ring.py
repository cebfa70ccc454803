"""A cache of keys and values that decodes many sequences at once.

Memory is allocated once, and a slot can be restarted at any time: the keys of its prompt are written into the columns
just before the clock's (`ring_step.py` says what a step does with them).

Shapes: N slots, W prompt columns, C ring columns, V vocabulary, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lmgym.models.caches import cache_keyword
from lmgym.models.causal import CausalLM, token_log_probs
from lmgym.models.cuda_graphs import StepGraphs, borrow_graphs, round_up_capacity, round_up_columns
from lmgym.models.drawing import Drawing
from lmgym.models.graph_pool import is_captured
from lmgym.models.lean.find import find_lean
from lmgym.models.padding import pad_left
from lmgym.models.ring_step import LeanStep, RingStep, make_step

TokenIds = tuple[int, ...]


class Prefilled(NamedTuple):
    """n prompts that have been read and wait for a slot.

    Attributes:
        states: their keys and values (n, heads, W, width) of every layer. logits: (n, V) of their next tokens.
        hidden: (n, D) input of the LM head, or None where it is not kept. lengths: (n,) in tokens.
    """

    states: list[Tensor]
    logits: Tensor
    hidden: Tensor | None
    lengths: Tensor


class _Waiting(NamedTuple):
    """What a slot will most likely start from: row `row` of prompts that have been read."""

    ids: TokenIds
    prompts: Prefilled
    row: int


class RingDecoder:
    """The ring cache. Memory: 2 * layers * N * C * width of all key-value heads, plus the logits N * V.

    Args:
        lm: the model. slots: N. capacity: C, the longest sequence a slot will hold; rings of graphs may have more.
        keep_hidden: whether to keep the input of the LM head.
        record: whether steps may run other than as the model's own code.
    """

    def __init__(
        self, lm: CausalLM, slots: int, capacity: int, *, keep_hidden: bool = False, record: bool = True
    ) -> None:
        self._lm = lm
        self._slots = slots
        self._longest = capacity
        self._keep_hidden = keep_hidden
        self._cache_keyword = cache_keyword(lm.model)
        self._lean = lm.remember(find_lean) if record else None
        self._step: RingStep | LeanStep = lm.remember(make_step, keep_hidden) if record else RingStep(lm, keep_hidden)
        self._captures = record and is_captured(lm.device)
        self._capacity = round_up_capacity(capacity) if self._captures else capacity
        self._graphs: StepGraphs | None = None
        self._rings: list[Tensor] = []
        self._clock = 0
        self._column = torch.zeros(1, dtype=torch.int64, device=lm.device)  # clock % C
        self._age = torch.zeros(slots, dtype=torch.int64, device=lm.device)  # tokens each slot has seen
        self._waiting: dict[int, _Waiting] = {}  # by slot
        self.logits = torch.zeros((slots, lm.vocab_size), dtype=lm.dtype, device=lm.device)
        self.hidden: Tensor | None = None

    def log_probs(self, tokens: Tensor) -> Tensor:
        """(N,) float32 nats of each slot's next token being this one."""
        with torch.inference_mode():
            return token_log_probs(self.logits, tokens)

    @torch.inference_mode()
    def prefill(self, ids: Tensor, mask: Tensor) -> Prefilled:
        """Reads prompts (n, W) without touching the ring."""
        lengths = mask.to(torch.int64).sum(-1)
        if self._lean is not None:
            read, states = self._lean.read(ids, None if bool(mask.all()) else mask.bool())
            last = read[:, -1]
            logits = self._lm.legal_logits(self._lean.logits(last, self._lm.vocab_size))
            return Prefilled(states, logits, last if self._keep_hidden else None, lengths)
        cache = DynamicCache()
        out = self._lm.model(
            input_ids=ids,
            attention_mask=mask.to(torch.int64),
            position_ids=(mask.to(torch.int64).cumsum(-1) - 1).clamp_(min=0),
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=self._keep_hidden,
            **{self._cache_keyword: cache},
        )
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        hidden = out.hidden_states[-1][:, -1] if self._keep_hidden else None
        return Prefilled(states, self._lm.legal_logits(out.logits[:, -1]), hidden, lengths)

    @torch.inference_mode()
    def insert(self, slots: Tensor, prompts: Prefilled, rows: Tensor) -> None:
        """Starts slots (n,) from rows (n,) of prompts that have been read."""
        if not self._rings:
            self._rings = self._make_rings(prompts.states)
        width = prompts.states[0].shape[2]
        if len(slots) == self._slots:
            self._rewind(width)
        elif self._clock < width:  # the prompt begins at the ring's end, from where on all columns are in use
            self._clock += self._capacity
        columns = torch.arange(self._clock - width, self._clock, device=slots.device) % self._capacity
        for ring, state in zip(self._rings, prompts.states, strict=True):
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
        self._graphs = borrow_graphs(self, self._lm, self._step, self._slots, self._longest, states, name)
        self._age = self._graphs.age.zero_()
        self._column = self._graphs.column.zero_()
        return self._graphs.rings

    def begin(self, slots: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Restarts slots (n,) from sequences (n, W), left-padded; equal ones are read once."""
        read, rows = find_distinct(ids, mask)
        self.insert(slots, self.prefill(ids[read], mask[read]), rows)

    def start(self, sequences: Mapping[int, TokenIds], upcoming: Callable[[int], TokenIds] | None = None) -> None:
        """Restarts slots from a sequence each, and reads ahead what other slots will most likely start from.

        One forward reads the sequences that are due, and with them the next one of every slot that has none waiting.

        Args:
            sequences: token ids by slot. upcoming: the sequence that a slot will most likely start from next.
        """
        if not all(self._is_waiting(slot, ids) for slot, ids in sequences.items()):
            self._read_ahead(sequences, upcoming)
        batches: dict[int, list[int]] = {}
        for slot in sequences:
            batches.setdefault(id(self._waiting[slot].prompts), []).append(slot)
        if len(sequences) == self._slots:
            self._rewind(max(self._waiting[slots[0]].prompts.states[0].shape[2] for slots in batches.values()))
        for slots in batches.values():
            taken = [self._waiting.pop(slot) for slot in slots]
            rows = torch.tensor([each.row for each in taken], device=self._lm.device)
            self.insert(torch.tensor(slots, device=self._lm.device), taken[0].prompts, rows)

    def _is_waiting(self, slot: int, ids: TokenIds) -> bool:
        return slot in self._waiting and self._waiting[slot].ids == ids

    def _read_ahead(self, sequences: Mapping[int, TokenIds], upcoming: Callable[[int], TokenIds] | None) -> None:
        wanted = {slot: ids for slot, ids in sequences.items() if not self._is_waiting(slot, ids)}
        if upcoming is not None:
            for slot in range(self._slots):
                if slot not in sequences and slot not in self._waiting:
                    wanted[slot] = upcoming(slot)
        rows = {sequence: row for row, sequence in enumerate(dict.fromkeys(wanted.values()))}
        ids, mask = pad_left(list(rows), self._lm.pad_token_id)
        prompts = self.prefill(ids.to(self._lm.device), mask.to(self._lm.device))
        for slot, sequence in wanted.items():
            self._waiting[slot] = _Waiting(sequence, prompts, rows[sequence])

    @torch.inference_mode()
    def _rewind(self, width: int) -> None:
        """Lets prompts of W columns begin at the first column where every slot is about to be restarted.

        Rounding is then the same again, and the columns that no slot has come to yet are left alone.
        """
        self._clock = width
        self._column.fill_(width % self._capacity)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        """Appends a token (N,) to every slot: one forward."""
        self._step.sync()
        columns = self._used_columns()
        if self._graphs is not None:
            self.logits, *hidden = self._graphs.run(tokens, columns)
        else:
            rings = [ring[:, :, :columns] for ring in self._rings]
            self.logits, *hidden = self._step(tokens, self._age, self._column, *rings)
            self._age = (self._age + 1).clamp_(max=self._longest - 1)
            self._column = (self._column + 1) % self._capacity
        self.hidden = hidden[0] if hidden else None
        self._clock += 1

    def take_over(self, drawing: Drawing, value_head: nn.Module | None) -> Drawing | None:
        """A drawing with the contents of this one, for `step_and_draw`; None where steps are not captured."""
        return None if self._graphs is None else self._graphs.take_over(drawing, value_head)

    def step_and_draw(self, drawing: Drawing, value_head: nn.Module | None) -> None:
        """Appends the newest tokens of a drawing that was taken over, and draws the next: one launch.

        `logits` and `hidden` are not kept.
        """
        assert self._graphs is not None
        self._step.sync()
        self._graphs.draw(drawing, value_head, self._used_columns())
        self._clock += 1

    def _used_columns(self) -> int:
        """Columns that the next step reads: up to the newest, where the clock has not come round yet."""
        used = self._clock + 1
        return round_up_columns(used, self._capacity) if self._captures else min(used, self._capacity)

    @torch.inference_mode()
    def keep(self, slots: Tensor) -> None:
        """Keeps only these slots (n,), in this order; the rings stay where they are unless there are more than N."""
        self._waiting.clear()  # slots have other numbers now
        if len(slots) > self._slots:
            self._rings = [ring[slots] for ring in self._rings]
            self._age = self._age[slots]
            self._graphs = None  # which read the rings where they were
        else:
            moved = (slots != torch.arange(len(slots), device=slots.device)).nonzero().squeeze(1)
            for state in (*self._rings, self._age):
                state[moved] = state[slots[moved]]
            self._rings = [ring[: len(slots)] for ring in self._rings]
            self._age = self._age[: len(slots)]
        self._slots = len(slots)
        self.logits = self.logits[slots]
        self.hidden = None if self.hidden is None else self.hidden[slots]


def find_distinct(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of left-padded sequences (n, W) to read so that each sequence is read once.

    Returns:
        (m,) the first row of each sequence, and (n,) the place of each row's sequence among them.
    """
    first: dict[tuple[int, ...], int] = {}
    rows: list[int] = []
    read: list[int] = []
    for row, sequence in enumerate(ids.masked_fill(~mask.bool(), -1).tolist()):
        found = first.setdefault(tuple(sequence), len(first))
        if found == len(read):
            read.append(row)
        rows.append(found)
    return torch.tensor(read, device=ids.device), torch.tensor(rows, device=ids.device)
