"""Sequences of unequal lengths in one tensor, and back.

With the token ids 7 8 9 in one row and 5 in another, and 0 for padding:
    left-padded   [[7, 8, 9], [0, 0, 5]]     what a prompt is: the last token stands in the last column
    right-padded  [[7, 8, 9], [5, 0, 0]]     what a response is: the first token stands in the first column
A mask is True on tokens.

Shapes: B rows, P prompt columns, T response columns, L columns, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Writes rows of token ids into one tensor, padding on the left.

    Args:
        rows: B rows of at most L ids. pad_token_id: fills the other columns. width: L; None is the longest row.

    Returns:
        ids (B, L) int64 and mask (B, L) bool.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    width = int(lengths.max()) if width is None else width
    return _write(rows, np.arange(width) >= width - lengths[:, None], pad_token_id)


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Writes rows of token ids into one tensor, padding on the right; the rest as for `pad_left`."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    width = int(lengths.max()) if width is None else width
    return _write(rows, np.arange(width) < lengths[:, None], pad_token_id)


def _write(rows: Sequence[Sequence[int]], mask: npt.NDArray[np.bool_], pad_token_id: int) -> tuple[Tensor, Tensor]:
    ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    ids[mask] = [token for row in rows for token in row]
    return torch.from_numpy(ids), torch.from_numpy(mask)


def compact_left(ids: Tensor, mask: Tensor, width: int | None = None) -> Tensor:
    """Moves the tokens of each row to its first columns, in their order.

    Args:
        ids: (B, L). mask: (B, L), True on tokens, which may have gaps between them.
        width: columns of the result; None is L.

    Returns:
        (B, width). What was off the mask stands after the tokens, in its order.
    """
    order = (~mask.bool()).to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, order[:, :width])


def compact_right(ids: Tensor, mask: Tensor, width: int | None = None) -> Tensor:
    """Moves the tokens of each row to its last columns, in their order; the rest as for `compact_left`."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    width = order.shape[1] if width is None else width
    return ids.gather(1, order[:, order.shape[1] - width :])


def join(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> Tensor:
    """Joins left-padded prompts and right-padded responses into sequences from column 0, right-padded.

    Args:
        prompt_ids: (B, P). prompt_mask: (B, P) bool. response_ids: (B, T). response_mask: (B, T) bool.

    Returns:
        (B, L) with L the longest pair.
    """
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    longest = max(int(mask.sum(-1).max()), 1)
    return compact_left(torch.cat([prompt_ids, response_ids], dim=1), mask, longest)


def pack(
    prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a model reads to predict every chosen token: joined sequences without the last token of the longest.

    Args:
        prompt_ids: (B, P). prompt_mask: (B, P) bool. response_ids: (B, T). response_mask: (B, T) bool.

    Returns:
        ids (B, L - 1) with L the longest pair; and for the n chosen tokens, in row-major order of `response_mask`: the
        row (n,) and column (n,) whose logits predict each, and the token itself (n,).
    """
    ids = join(prompt_ids, prompt_mask, response_ids, response_mask)
    rows, t = response_mask.nonzero(as_tuple=True)
    columns = prompt_mask.sum(-1)[rows] + t - 1
    return ids[:, : max(ids.shape[1] - 1, 1)], rows, columns, response_ids[rows, t]
