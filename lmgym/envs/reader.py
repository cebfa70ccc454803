"""The reference as the engine needs it: log-probs of the tokens just chosen, one cached forward a step.

Shapes: N rows, V vocabulary, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.envs.prompts import Prompt
from lmgym.models.causal import CausalLM, token_log_probs
from lmgym.models.decoding import Decoder, Prefilled, RingDecoder, TableDecoder, make_decoder
from lmgym.models.padding import pad_left

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Reader:
    """Feeds the reference: which tokens are due, which rows restart, and prompts read ahead in batches."""

    def __init__(self, lm: CausalLM, rows: int, capacity: int, *, keep_hidden: bool = False) -> None:
        self._lm, self._device, self.keeps_hidden = lm, lm.device, keep_hidden
        self._decoder: Decoder = make_decoder(lm, rows, capacity, keep_hidden=keep_hidden)
        self._due: Tensor | None = None  # (N,) tokens chosen but not yet fed
        self._starting: dict[int, Prompt | tuple[Ints, npt.NDArray[np.int8]]] = {}
        self._ahead: Callable[[int], Prompt] | None = None
        self._ready: dict[int, tuple[Prompt, Prefilled, int]] = {}
        self._rows = rows

    def start(self, rows: Ints, prompts: Sequence[Prompt], ahead: Callable[[int], Prompt] | None) -> None:
        """Has rows (n,) go on from a prompt each; `ahead` gives the one a row will most likely want next."""
        self._ahead = ahead
        self._starting.update(zip(rows.tolist(), prompts, strict=True))

    def restart(self, row: int, ids: Ints, mask: npt.NDArray[np.int8]) -> None:
        """Has a row go on from a left-padded sequence (W,), a prompt with a part of a response."""
        self._starting[row] = (ids.copy(), mask.copy())

    def logits(self) -> Tensor:
        """(N, V) of every row's next token."""
        self._catch_up()
        return self._decoder.logits

    def hidden(self) -> Tensor:
        """(N, D) input of the LM head that made the logits, where it is kept."""
        self._catch_up()
        hidden = self._decoder.hidden
        assert hidden is not None
        return hidden

    def _catch_up(self) -> None:
        """Brings every row up to date."""
        if self._due is not None and len(self._starting) < self._rows:
            self._decoder.step(self._due)
        self._due = None
        if self._starting:
            self._start_rows()

    def log_probs(self, tokens: Ints) -> Floats:
        """(N,) float64 nats of the tokens chosen now; they are fed when the next logits are asked for."""
        chosen = torch.from_numpy(tokens).to(self._device)
        self._catch_up()
        if isinstance(self._decoder, TableDecoder):
            log_probs = self._decoder.log_probs(chosen)
        else:
            with torch.inference_mode():
                log_probs = token_log_probs(self._decoder.logits, chosen)
        self._due = chosen
        return log_probs.cpu().numpy().astype(np.float64)

    def _start_rows(self) -> None:
        if len(self._starting) == self._rows and isinstance(self._decoder, RingDecoder):
            self._decoder.rewind()
        prompts = {row: p for row, p in self._starting.items() if isinstance(p, Prompt)}
        for row, prefix in self._starting.items():
            if not isinstance(prefix, Prompt):
                ids, mask = (torch.from_numpy(x)[None].to(self._device) for x in prefix)
                self._decoder.begin(torch.tensor([row], device=self._device), ids, mask)
        self._starting = {}
        if not isinstance(self._decoder, RingDecoder):
            if prompts and isinstance(self._decoder, TableDecoder):
                # A table looks back by two tokens at most: the whole prompt need not be padded.
                ends = torch.tensor([(-1, *p.ids[-2:])[-2:] for p in prompts.values()], device=self._device)
                self._decoder.begin(self._index(list(prompts)), ends, ends >= 0)
            elif prompts:
                self._decoder.begin(self._index(list(prompts)), *self._left_padded(list(prompts.values())))
            return
        if not all(self._is_ready(row, prompt) for row, prompt in prompts.items()):
            self._read_ahead(self._decoder, prompts)
        batches: dict[int, list[int]] = {}
        for row in prompts:
            batches.setdefault(id(self._ready[row][1]), []).append(row)
        for rows in batches.values():
            taken = [self._ready.pop(row) for row in rows]
            self._decoder.insert(self._index(rows), taken[0][1], self._index([place for _, _, place in taken]))

    def _is_ready(self, row: int, prompt: Prompt) -> bool:
        return row in self._ready and self._ready[row][0] is prompt

    def _read_ahead(self, decoder: RingDecoder, prompts: dict[int, Prompt]) -> None:
        """Reads the prompts due now, and with them the next one of every row that has none waiting."""
        wanted = {row: prompt for row, prompt in prompts.items() if not self._is_ready(row, prompt)}
        if self._ahead is not None:
            for row in range(self._rows):
                if row not in prompts and row not in self._ready:
                    wanted[row] = self._ahead(row)
        batch = decoder.prefill(*self._left_padded(list(wanted.values())))
        for place, (row, prompt) in enumerate(wanted.items()):
            self._ready[row] = (prompt, batch, place)

    def _left_padded(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_left([p.ids for p in prompts], self._lm.pad_token_id)
        return ids.to(self._device), mask.to(self._device)

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, device=self._device)
