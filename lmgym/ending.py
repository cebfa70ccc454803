"""When a response ends: the one rule that stepping, replaying, sampling and every solver ask.

Shapes: B responses, T response columns, V vocabulary; `...` is any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Table = TypeVar("Table", "npt.NDArray[np.bool_]", "Tensor")


@dataclass(frozen=True, eq=False)
class EndRule(Generic[Table]):
    """A response ends with the first EOS from token `min_new_tokens` on, or else with its T-th token.

    Tokens are counted from 0. With `min_new_tokens=2` and `horizon=4`, an EOS ends a response as token 2 or 3; as token
    0 or 1 it is a token like the rest; and token 3 ends it whatever it is.

    Attributes:
        is_eos: (V,) bool, a NumPy array or a tensor; the methods answer with the same kind.
        min_new_tokens: tokens before the first EOS that counts.
        horizon: T, in tokens.
    """

    is_eos: Table
    min_new_tokens: int
    horizon: int

    def is_end_by_eos(self, tokens: Any, t: Any) -> Table:
        """(...) bool: whether tokens (...), each token t of its response, end it because they are an EOS.

        Args:
            tokens: int ids. t: an int, or an array of the same kind that broadcasts with `tokens`.
        """
        ends: Table = self.is_eos[tokens] & (t >= self.min_new_tokens)
        return ends

    def is_end(self, tokens: Any, t: Any) -> Table:
        """(...) bool: whether tokens (...), each token t of its response, end it. Arguments as in `is_end_by_eos`."""
        ends: Table = self.is_end_by_eos(tokens, t) | (t == self.horizon - 1)
        return ends

    def find_ending_tokens(self, t: int) -> Table:
        """(V,) bool: which ids end a response as its token t."""
        return self.is_end(slice(None), t)

    def find_end(self, response: Sequence[int]) -> int | None:
        """The position of the token that ends a response, or None where the response goes on after its last token."""
        for t, token in enumerate(response):
            if self.is_end(token, t):
                return t
        return None

    def find_ends(self, response_ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The ends of whole responses (B, T). What stands after an end is not read, and may be any number.

        Returns:
            (B,) int64 lengths in tokens, the last one included, and (B,) bool, whether that last one is an EOS.
        """
        known = (response_ids >= 0) & (response_ids < len(self.is_eos))
        columns = np.arange(self.horizon)
        by_eos = np.asarray(self.is_end_by_eos(np.where(known, response_ids, 0), columns)) & known
        ended: npt.NDArray[np.bool_] = np.any(by_eos, axis=1)
        lengths = np.where(ended, by_eos.argmax(1) + 1, self.horizon)
        return lengths, ended
