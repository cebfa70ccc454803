"""Logits of whole sequences of tokens under a sequence-classification model, read at each sequence's own last token.

Transformers looks for the last token that is not the pad token. Where EOS is the pad token, as in many models, that is
a token before the end, and a response with an EOS scores as one without. Here the lengths are known, so that no token
is taken for padding, and the config of the model, which others share, is never written to.

Shapes: n sequences, L columns, D width of the trunk, K labels.
"""

from __future__ import annotations

import copy
import enum
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmgym.models.padding import pad_right
from lmgym.models.positions import first_position
from lmgym.models.transfer import to_device

_NO_TOKEN = -1  # as the pad token: then every token is one to be read
_PROBE_TOKENS = 6


class Reading(enum.Enum):
    """How sequences of several lengths can share a forward of a model."""

    LAST_TOKEN = "the score head is read at the last token of each, so that what follows is not seen"
    PADDED = "the model itself disregards what the attention mask leaves out"
    EQUAL_LENGTHS = "it does not: only sequences of one length share a forward"


_readings: weakref.WeakKeyDictionary[nn.Module, Reading] = weakref.WeakKeyDictionary()


def sequence_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(n, K) logits of sequences of one or more tokens; differentiable.

    Each row is what the model gives the sequence on its own, with every token in it read as a token.

    Args:
        model: a Hugging Face sequence-classification model, in eval mode.
        sequences: token ids, special tokens included.
    """
    reading = _readings.get(model)
    if reading is None:
        reading = _readings[model] = find_reading(model)
    if reading is Reading.LAST_TOKEN:
        return _read_last_tokens(model, sequences)
    if reading is Reading.PADDED:
        return _forward(model, *pad_right(sequences, _fill(model)))
    return _read_equal_lengths(model, sequences)


@torch.no_grad()
def find_reading(model: Any) -> Reading:
    """The quickest reading that gives two short sequences together what each has on its own."""
    sequences = probe_sequences(model)
    try:
        alone = torch.cat([_read_equal_lengths(model, [sequence]) for sequence in sequences])
        has_score_head = isinstance(getattr(model, "score", None), nn.Module)
        if has_score_head and _are_close(_read_last_tokens(model, sequences), alone):
            return Reading.LAST_TOKEN
        if _are_close(_forward(model, *pad_right(sequences, _fill(model))), alone):
            return Reading.PADDED
    except (IndexError, RuntimeError, ValueError):
        pass  # a model such as BART, which reads at the EOS and takes no sequence without one
    return Reading.EQUAL_LENGTHS


def _read_last_tokens(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(n, K): the trunk over all of them, right-padded, and the score head at the last token of each.

    Causal attention does not see the padding. Without a mask the fastest attention of a GPU applies.
    """
    ids, mask = pad_right(sequences, _fill(model))
    ids = to_device(ids, model.device)
    last = to_device(mask.sum(1) - 1, model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]  # (n, L, D)
    return model.score(hidden[torch.arange(len(ids), device=hidden.device), last])


def _read_equal_lengths(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """(n, K): a forward for each length, without padding."""
    rows_by_length: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        rows_by_length.setdefault(len(sequence), []).append(row)
    parts = []
    for rows in rows_by_length.values():
        parts.append(_forward(model, *pad_right([sequences[row] for row in rows], _NO_TOKEN)))
    order = torch.tensor([row for rows in rows_by_length.values() for row in rows])
    return torch.cat(parts)[order.argsort().to(parts[0].device)]


def _forward(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(n, K): the model's own forward, with no token as its pad token."""
    reader = copy.copy(model)  # shares every weight; only its config is another
    reader.config = copy.deepcopy(model.config)
    reader.config.get_text_config().pad_token_id = _NO_TOKEN
    mask = mask.long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    first = first_position(model)
    if first and "position_ids" in inspect.signature(model.forward).parameters:
        # Such a model counts the tokens that are not its pad token, which a policy may have chosen nevertheless.
        inputs["position_ids"] = mask.cumsum(1) * mask + first - 1
    return reader(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits


def _fill(model: Any) -> int:
    """A token for the columns that hold none."""
    pad = model.config.get_text_config().pad_token_id
    embedded = model.get_input_embeddings().weight.shape[0]
    return pad if isinstance(pad, int) and 0 <= pad < embedded else 0


def probe_sequences(model: Any) -> list[list[int]]:
    """Two short sequences of unlike lengths, without the special tokens of the model."""
    config = model.config.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "sep", "cls")}
    embedded = model.get_input_embeddings().weight.shape[0]
    tokens = [i for i in range(embedded) if i not in special][:_PROBE_TOKENS] or [0]
    return [tokens[::-1], tokens[: max(1, len(tokens) // 2)]]


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two (n, K) logits agree as far as their precision goes."""
    if found.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance / 10)
