"""Padding, compacting and packing, each against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmgym.models.padding import compact_left, compact_right, join, pack, pad_left, pad_right

ROWS = [[7, 8, 9], [5], [], [4, 3]]
PAD = 0


@pytest.mark.parametrize("width", [None, 3, 5])
def test_rows_are_padded_on_either_side(width: int | None) -> None:
    columns = width or 3
    ids, mask = pad_left(ROWS, PAD, width)
    assert ids.tolist() == [[PAD] * (columns - len(row)) + row for row in ROWS]
    assert mask.tolist() == [[False] * (columns - len(row)) + [True] * len(row) for row in ROWS]
    ids, mask = pad_right(ROWS, PAD, width)
    assert ids.tolist() == [row + [PAD] * (columns - len(row)) for row in ROWS]
    assert mask.tolist() == [[True] * len(row) + [False] * (columns - len(row)) for row in ROWS]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_the_pad_token_may_be_a_token_of_a_row() -> None:
    ids, mask = pad_left([[0, 1], [0]], pad_token_id=0)
    assert ids.tolist() == [[0, 1], [0, 0]]
    assert mask.tolist() == [[True, True], [False, True]]


def scattered(seed: int) -> tuple[Tensor, Tensor]:
    """(6, 9) ids and a mask with gaps, one row of it empty and one full."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand((6, 9), generator=rng) < 0.5
    mask[0] = False
    mask[1] = True
    return torch.randint(1, 99, (6, 9), generator=rng), mask


@pytest.mark.parametrize("seed", range(3))
def test_tokens_move_together_in_their_order(seed: int) -> None:
    ids, mask = scattered(seed)
    left = compact_left(ids, mask)
    right = compact_right(ids, mask)
    for row in range(len(ids)):
        tokens = ids[row][mask[row]].tolist()
        others = ids[row][~mask[row]].tolist()
        assert left[row].tolist() == tokens + others
        assert right[row].tolist() == others + tokens
    assert torch.equal(compact_left(ids, mask.long(), 4), left[:, :4])
    assert torch.equal(compact_right(ids, mask.long(), 4), right[:, 5:])


def test_compacting_undoes_padding() -> None:
    ids, mask = pad_left(ROWS, PAD, 5)
    assert torch.equal(compact_left(ids, mask), pad_right(ROWS, PAD, 5)[0])
    ids, mask = pad_right(ROWS, PAD, 5)
    assert torch.equal(compact_right(ids, mask), pad_left(ROWS, PAD, 5)[0])


def test_packing_joins_prompts_and_responses() -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    responses = [[7], [8, 9, 10], [11, 12]]
    parts = (*pad_left(prompts, PAD, 4), *pad_right(responses, PAD, 4))
    joined = join(*parts)
    packed, rows, columns, targets = pack(*parts)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = prompt + response
        assert packed[row].tolist() == (whole + [PAD] * 5)[:4]  # the last token of the longest predicts nothing
        assert joined[row].tolist() == (whole + [PAD] * 5)[:5]
        at = columns[rows == row].tolist()
        assert at == list(range(len(prompt) - 1, len(whole) - 1))  # the column before each response token
        assert [whole[column + 1] for column in at] == response == targets[rows == row].tolist()
