"""Checks that a model can be a reference, by running it once: it reads from left to right, in finite numbers.

Shapes: L columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.models.loading import check_finite_weights
from lmgym.models.markov import MarkovLM

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

_PROBE_TOKENS = 8  # in a sequence; the second half is changed, and the logits of the first must stay as they are
_TOLERANCE = 1e-4  # of the largest logit, in float32; two forwards of one shape differ by rounding at most
_COARSE_TOLERANCE = 1e-2  # the same in half precision


def check_language_model(lm: CausalLM) -> None:
    """Raises unless the model reads from left to right and its logits are finite; runs it once.

    Raises:
        LmGymError: for a model that sees the tokens it is to predict, or whose weights are not finite.
        InvalidArgumentError: where only its dtype makes the logits infinite.
    """
    if not isinstance(lm.model, MarkovLM):
        lm.remember(_check_language_model)


@torch.no_grad()
def _check_language_model(lm: CausalLM) -> None:
    first, second = _probe_sequences(lm)
    ids = torch.tensor([first, second], device=lm.device)
    logits = _legal_logits(lm, ids)
    check_finite(lm, logits)
    half = ids.shape[1] // 2
    gap = (logits[0, :half] - logits[1, :half]).abs().max() if half else torch.zeros(())
    tolerance = _TOLERANCE if lm.dtype in (torch.float32, torch.float64) else _COARSE_TOLERANCE
    if gap > tolerance * logits.abs().max().clamp(min=1e-6):
        raise LmGymError(
            f"`model` {_name_of(lm)}must be a causal language model, and this {type(lm.model).__name__} is not: its "
            "logits at a token change with the tokens after it, as in BERT, which fills in masks. Name a model that "
            "writes from left to right, or set is_decoder to true in the config.json of one that was trained so."
        )


def check_prompts_are_finite(lm: CausalLM, prompts: Sequence[Sequence[int]]) -> None:
    """Raises as `check_language_model` does unless the logits after every token of these prompts are finite."""
    if not isinstance(lm.model, MarkovLM):
        lm.remember(_check_prompts_are_finite, tuple(tuple(ids) for ids in prompts))


@torch.no_grad()
def _check_prompts_are_finite(lm: CausalLM, prompts: tuple[tuple[int, ...], ...]) -> None:
    for ids in prompts:
        check_finite(lm, _legal_logits(lm, torch.tensor([ids], device=lm.device)))


def check_finite(lm: CausalLM, logits: Tensor) -> None:
    """Raises unless logits of legal tokens are finite, saying whether weights or dtype are the cause."""
    if not bool(logits.isfinite().all()):
        _refuse(lm)


def check_log_probs(lm: CausalLM, log_probs: npt.NDArray[np.floating]) -> None:
    """Raises as `check_finite` where log-probs of a reference overflow at a token that no check has read.

    They are NaN, or -inf where one logit is inf; the tokens that a table leaves out are at -inf by right.
    """
    if np.isfinite(log_probs.sum()):
        return
    may_be_infinite = lm.dtype != torch.float16 or isinstance(lm.model, MarkovLM)
    if np.isnan(log_probs).any() or not may_be_infinite:
        _refuse(lm)


def _refuse(lm: CausalLM) -> NoReturn:
    check_finite_weights("model", lm.model.name_or_path or "given", lm.model)
    dtype = str(lm.dtype).removeprefix("torch.")
    if lm.dtype == torch.float16:
        raise InvalidArgumentError(
            f"`dtype` must be one that the numbers of `model` {_name_of(lm)}fit in, got 'float16', whose largest is "
            "65,504: its logits are not finite. Take dtype='bfloat16' or dtype='float32'."
        )
    raise LmGymError(
        f"`model` {_name_of(lm)}must give finite logits, and does not in {dtype}. Name another checkpoint of it."
    )


def _name_of(lm: CausalLM) -> str:
    """The model's name and a blank, for a message; "" where it has no name."""
    name = getattr(lm.model, "name_or_path", "")
    return f"{name!r} " if name else ""


def _legal_logits(lm: CausalLM, ids: Tensor) -> Tensor:
    """(B, L, legal tokens) float32 logits at every position."""
    logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    legal = lm.legal_logits(torch.zeros(logits.shape[-1], device=logits.device)).isfinite()
    return logits[..., : lm.vocab_size][..., legal]


def _probe_sequences(lm: CausalLM) -> tuple[list[int], list[int]]:
    """Two sequences of words with one first half, and different tokens at every position of the second."""
    words = sorted(set(lm.tokenizer.get_vocab().values()) - set(lm.tokenizer.all_special_ids))
    words = words or [i for i in range(lm.vocab_size) if lm.is_legal(i)]
    length = min(_PROBE_TOKENS, lm.max_positions or _PROBE_TOKENS)
    spread = [words[i * len(words) // length] for i in range(length)]
    half = length // 2
    others = {word: words[(i + 1) % len(words)] for i, word in enumerate(words)}
    return spread, spread[:half] + [others[word] for word in spread[half:]]
