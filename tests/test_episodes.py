"""The batch type: shapes, rows, columns."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError

B = 4
P = 5
T = 6


def episodes(*, values: bool = True, gold: bool = False, seed: int = 0) -> Episodes:
    """Ragged prompts of 3, 1, 2 and 3 tokens, responses of 2, 4, 1 and 3."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.tensor([3, 1, 2, 3])
    responses = torch.tensor([2, 4, 1, 3])
    return Episodes(
        prompt_ids=torch.randint(9, (B, P), generator=generator),
        prompt_mask=torch.arange(P) >= P - prompts[:, None],
        response_ids=torch.randint(9, (B, T), generator=generator),
        response_mask=torch.arange(T) < responses[:, None],
        log_probs=torch.rand((B, T), generator=generator),
        ref_log_probs=torch.rand((B, T), generator=generator),
        scores=torch.rand(B, generator=generator),
        values=torch.rand((B, T), generator=generator) if values else None,
        terminated=torch.tensor([True, False, True, True]),
        prompt_index=torch.arange(B),
        gold_scores=torch.rand(B, generator=generator) if gold else None,
    )


def assert_equal(one: Episodes, other: Episodes) -> None:
    for f in fields(Episodes):
        left = getattr(one, f.name)
        right = getattr(other, f.name)
        assert (left is None) == (right is None), f.name
        assert left is None or torch.equal(left, right), f.name


NAMES = [f.name for f in fields(Episodes) if f.name != "prompt_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_shape_is_named(name: str) -> None:
    batch = episodes(gold=True)
    right = getattr(batch, name)
    wrong = right[:-1] if right.ndim == 1 else right[:, :-1]
    culprit = name
    if name == "response_ids":  # T is read off it: the others are then wrong
        culprit = "response_mask"
    message = rf"`{culprit}` must have shape \({B},.*\), got \("
    with pytest.raises(InvalidArgumentError, match=message):
        replace(batch, **{name: wrong})
    with pytest.raises(InvalidArgumentError):
        replace(batch, **{name: right[:-1]})


def test_lengths_and_columns() -> None:
    batch = episodes()
    assert len(batch) == B
    assert batch.lengths.tolist() == [2, 4, 1, 3]
    assert batch.num_tokens == 10
    assert torch.equal(batch.input_ids, torch.cat([batch.prompt_ids, batch.response_ids], 1))
    assert batch.attention_mask.sum(-1).tolist() == [5, 5, 3, 6]


def test_trimmed_drops_only_columns_without_a_token() -> None:
    batch = episodes()
    cut = batch.trimmed()
    assert cut.prompt_ids.shape == (B, 3)
    for name in ("response_ids", "response_mask", "log_probs", "ref_log_probs", "values"):
        assert getattr(cut, name).shape == (B, 4)
    assert torch.equal(cut.prompt_ids[cut.prompt_mask], batch.prompt_ids[batch.prompt_mask])
    for name in ("response_ids", "log_probs", "ref_log_probs", "values"):
        assert torch.equal(getattr(cut, name)[cut.response_mask], getattr(batch, name)[batch.response_mask])
    assert_equal(cut.trimmed(), cut)
    short = batch[torch.tensor([2])].trimmed()
    assert short.prompt_ids.shape == (1, 2)
    assert short.response_ids.shape == (1, 1)
    assert episodes(values=False).trimmed().values is None


@pytest.mark.parametrize(
    "rows",
    [torch.tensor([3, 0]), slice(1, 3), [2, 2, 1], torch.tensor([True, False, False, True])],
    ids=["index", "slice", "list", "mask"],
)
def test_picking_rows_picks_every_field(rows: object) -> None:
    batch = episodes(values=False, gold=True)
    picked = batch[rows]  # type: ignore[index]
    assert picked.values is None
    numbers = torch.arange(B)[rows].tolist()  # type: ignore[index]
    assert len(picked) == len(numbers)
    for position, row in enumerate(numbers):
        for f in fields(Episodes):
            if f.name != "values":
                assert torch.equal(getattr(picked, f.name)[position], getattr(batch, f.name)[row])


def test_concatenating_parts_gives_the_whole() -> None:
    batch = episodes(gold=True)
    assert_equal(Episodes.concatenate([batch[:1], batch[1:3], batch[3:]]), batch)
    assert Episodes.concatenate([episodes(values=False), episodes(values=False, seed=1)]).values is None
    with pytest.raises(InvalidArgumentError, match="`parts` must hold at least one Episodes, got none."):
        Episodes.concatenate([])


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        Episodes.concatenate([episodes(values=True), episodes(values=False)])
    with pytest.raises(InvalidArgumentError):
        Episodes.concatenate([episodes(values=False), episodes(values=True)])
    with pytest.raises(InvalidArgumentError):
        Episodes.concatenate([episodes(), episodes().trimmed()])


def test_to_moves_every_tensor_and_frozen_means_frozen() -> None:
    batch = episodes(values=False, gold=True)
    moved = batch.to("meta")
    for f in fields(Episodes):
        tensor = getattr(moved, f.name)
        assert tensor is None or tensor.device.type == "meta"
    with pytest.raises(AttributeError):
        batch.scores = torch.zeros(B)  # type: ignore[misc]
