"""The reference as the engine needs it: log-probs of the tokens just chosen, one cached forward a step.

Shapes: N rows, V vocabulary, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.models.causal import CausalLM
from lmgym.models.decoding import make_decoder
from lmgym.models.ring import TokenIds

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Reader:
    """Feeds the reference as late as possible: a token is read when the logits after it are asked for.

    The last token of an episode is therefore never read, and rows that restart are started together.

    Args:
        lm: the reference. rows: N. capacity: the longest sequence a row will hold, in tokens.
        keep_hidden: whether to keep the input of the LM head.
    """

    def __init__(self, lm: CausalLM, rows: int, capacity: int, *, keep_hidden: bool = False) -> None:
        self.keeps_hidden = keep_hidden
        self._device = lm.device
        self._rows = rows
        self._decoder = make_decoder(lm, rows, capacity, keep_hidden=keep_hidden)
        self._unread: Tensor | None = None  # (N,) tokens chosen but not yet fed
        self._starting: dict[int, TokenIds] = {}
        self._upcoming: Callable[[int], TokenIds] | None = None

    def start(self, sequences: Mapping[int, TokenIds], upcoming: Callable[[int], TokenIds] | None) -> None:
        """Lets rows go on from new sequences.

        Args:
            sequences: token ids by row. upcoming: the sequence that a row will most likely start from next.
        """
        self._starting.update(sequences)
        self._upcoming = upcoming

    def restart(self, row: int, sequence: TokenIds) -> None:
        """Lets one row go on from another sequence than the one it was started with, such as a longer one."""
        self._starting[row] = sequence

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

    def log_probs(self, tokens: Ints) -> Floats:
        """(N,) float64 nats of the tokens chosen now; they are fed when the next logits are asked for."""
        chosen = torch.from_numpy(tokens).to(self._device)
        self._catch_up()
        log_probs = self._decoder.log_probs(chosen)
        self._unread = chosen
        return log_probs.cpu().numpy().astype(np.float64)

    def _catch_up(self) -> None:
        """Feeds the tokens that were chosen, and starts the rows that go on from a new sequence."""
        if self._unread is not None and len(self._starting) < self._rows:
            self._decoder.step(self._unread)
        self._unread = None
        if self._starting:
            self._decoder.start(self._starting, self._upcoming)
            self._starting = {}
