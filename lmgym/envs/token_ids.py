"""Token ids as people give them, checked, and what they say: the name of an action, a text, the id of a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lmgym.errors import InvalidActionError, InvalidArgumentError, shorten

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM


def is_integer(value: object) -> bool:
    """Whether a value is a whole number, of Python or of NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def to_array(values: Any) -> npt.NDArray[Any] | None:
    """Values of any library as an array; None for what is none, such as a ragged list or a tensor without data."""
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = values.float() if values.is_floating_point() else values
        return np.asarray(values)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return None


def as_token_ids(argument: str, ids: Any) -> list[int]:
    """Token ids as a list, from any sequence of integers, an array or a tensor.

    Raises:
        InvalidArgumentError: for anything else, such as a text, a set, or numbers that are not whole.
    """
    array = ids
    if hasattr(ids, "tolist"):
        try:
            array = ids.tolist()
        except RuntimeError:  # such as a tensor on the device "meta"
            array = None
    if not isinstance(array, Sequence) or isinstance(array, (str, bytes)) or not all(is_integer(i) for i in array):
        raise InvalidArgumentError(f"`{argument}` must be a sequence of token ids, got {shorten(ids)}.")
    return [int(i) for i in array]


def as_actions(actions: Any, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Token ids as an int64 array of a shape; raises `InvalidActionError` for anything else."""
    array = to_array(actions)
    if array is None or array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise InvalidActionError(f"`action` must be integer token ids of shape {shape}, got {shorten(actions)}.")
    return array.astype(np.int64)


def refuse_text(lm: CausalLM, action: Any) -> None:
    """Raises `InvalidActionError` for an action that is a text, or texts, saying which ids it has."""
    text = action
    while isinstance(text, (list, tuple)) and text:
        text = text[0]
    if isinstance(text, np.ndarray) and text.dtype.kind == "U" and text.size:
        text = str(text.flat[0])
    if isinstance(text, str):
        raise InvalidActionError(f"`action` must be a token id, got the text {str(text)!r}. {_say_ids(lm, str(text))}")


def _say_ids(lm: CausalLM, text: str) -> str:
    """Which ids a text has, by itself and after a blank, where many tokenizers have another."""
    vocabulary = lm.tokenizer.get_vocab()
    if text in vocabulary:
        return f"Its id is {vocabulary[text]}."
    unknown = {lm.tokenizer.unk_token_id}
    found = {t: _ids_of(lm, t) for t in (text, f" {text}")}
    found = {t: ids for t, ids in found.items() if ids and not unknown & set(ids)}
    single = {ids[0]: t for t, ids in reversed(found.items()) if len(ids) == 1}
    if single:
        return f"The id of {' and that of '.join(f'{t!r} is {token}' for token, t in sorted(single.items()))}."
    if found:
        return f"Its ids are {next(iter(found.values()))}: step them one by one."
    return "The tokenizer has no token for it."


def _ids_of(lm: CausalLM, text: str) -> list[int]:
    """Ids of a text; none where the tokenizer has no word for a part of it, nor a token that stands for any."""
    try:
        return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception:  # tokenizers raises nothing narrower
        return []


def name_actions(lm: CausalLM) -> list[str]:
    """V texts, what each token id says by itself; a special token by its name."""
    missing = set(lm.holes)
    ids = [[] if token in missing else [token] for token in range(lm.vocab_size)]
    texts = lm.tokenizer.batch_decode(ids, skip_special_tokens=False)
    return [f"<no token {token}>" if token in missing else str(text) for token, text in enumerate(texts)]


def decode_ids(lm: CausalLM, ids: Any) -> str:
    """The text of one token id, of several, or of a (dict or flat) observation; special tokens by their names.

    Args:
        lm: whose tokenizer they are of.
        ids: an int, a sequence or array (n,) of ints, or one row's observation: padding is left out.

    Raises:
        InvalidArgumentError: for anything else, and for an id that the tokenizer does not have.
    """
    if isinstance(ids, Mapping) and {"input_ids", "attention_mask"} <= ids.keys():
        ids = np.asarray(ids["input_ids"])[np.asarray(ids["attention_mask"]).astype(bool)]
    array = np.atleast_1d(np.asarray(ids.tolist() if hasattr(ids, "tolist") else ids))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InvalidArgumentError(f"`ids` must be a token id, several (n,), or an observation, got {ids!r}.")
    chosen = array[array != -1].tolist()  # -1 is where a flat observation has no token
    for token in chosen:
        if not lm.is_legal(token):
            raise InvalidArgumentError(f"`ids` must be token ids from 0 to {lm.vocab_size - 1}, got {token}.")
    return str(lm.tokenizer.decode(chosen, skip_special_tokens=False))
