"""One copy of a model for everybody who asks for it: by name, by temperature, by device.

A loaded model is found again by its name for as long as anybody holds it. Its copies at other temperatures and on other
devices lie in its own cache (`CausalLM.remember`).
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from transformers import AutoModelForCausalLM

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.models.activations import fuse_activations
from lmgym.models.adapters import load_pretrained
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.markov import MarkovLM
from lmgym.models.names import check_model_name
from lmgym.models.probes import check_language_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """A torch device from its name; "auto" is the GPU where there is one.

    Raises:
        InvalidArgumentError: if the name is not a device, or is a GPU this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(
            f"`device` must be 'auto' or a torch device such as 'cpu', got {device!r}."
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(f"`device` must be one this machine has, got {device!r} and torch sees no GPU.")
    return resolved


Held = TypeVar("Held")


class SharedModels(Generic[Held]):
    """Loads models with their tokenizers, frozen; one copy a (name, device, dtype) for as long as anybody holds it.

    Args:
        argument: what the name is called in messages.
        auto_class: the transformers class that loads the model.
        wrap: makes the object that is shared, from a model and its tokenizer.
    """

    def __init__(self, argument: str, auto_class: Any, wrap: Callable[[Any, Any], Held]) -> None:
        self._argument = argument
        self._auto_class = auto_class
        self._wrap = wrap
        self._held: weakref.WeakValueDictionary[tuple[Any, ...], Held] = weakref.WeakValueDictionary()
        self._loading = threading.Lock()

    def load(self, name: str, device: str, dtype: str) -> Held:
        """The model of that name on that device, loaded now or before.

        Raises:
            InvalidArgumentError: for a name, device or dtype that cannot be.
            LmGymError: if Hugging Face cannot load it; the cause is chained.
        """
        check_model_name(self._argument, name)
        name = os.fspath(name)
        check_choice("dtype", dtype, DTYPES)
        resolved = resolve_device(device)
        key = (*_identity(name), str(resolved), dtype)
        with self._loading:
            held = self._held.get(key)
            if held is None:
                model, tokenizer = load_pretrained(self._argument, name, self._auto_class, DTYPES[dtype])
                held = self._held[key] = self._wrap(freeze(fuse_activations(model).to(resolved)), tokenizer)
        return held


def _identity(name: str) -> tuple[Any, ...]:
    """What tells a model from others: its directory and the state of its files, which may be overwritten."""
    if not os.path.isdir(name):
        return (name,)
    states = []
    for entry in os.scandir(name):
        if entry.is_file():
            state = entry.stat()
            states.append((entry.name, state.st_mtime_ns, state.st_size))
    return os.path.realpath(name), *sorted(states)


_causal_lms = SharedModels("model", AutoModelForCausalLM, CausalLM)


def load_causal_lm(name: str, device: str = "auto", dtype: str = "float32") -> CausalLM:
    """Loads a causal LM and its tokenizer in eval mode, frozen; one copy a (name, device, dtype) while held.

    Args:
        name: local directory or hub name.
        device: "auto", "cpu", "cuda", ...
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InvalidArgumentError: for a name, device or dtype that cannot be.
        LmGymError: if Hugging Face cannot load it; the cause is chained.
    """
    lm = _causal_lms.load(name, device, dtype)
    check_language_model(lm)
    return lm


def temper(lm: CausalLM, temperature: float) -> CausalLM:
    """The model whose distributions are softmax(logits / temperature), on the same weights; one copy while it is held.

    A table of transition probabilities becomes another table, so that whoever reads it sees the probabilities.

    Raises:
        InvalidArgumentError: for a table of low rank, which no temperature but 1 leaves of low rank.
    """
    if temperature == 1:
        return lm
    copies = lm.remember(_copies_by_temperature)
    found = copies.get(temperature)
    if found is None:
        if isinstance(lm.model, MarkovLM):
            found = CausalLM(freeze(_temper_table(lm.model, temperature).to(lm.device, lm.dtype)), lm.tokenizer)
        else:
            found = CausalLM(lm.model, lm.tokenizer, lm.temperature * temperature)
        found.origin = lm  # whoever holds the copy holds its origin, and with it the cache that finds the copy again
        copies[temperature] = found
    return found


def _copies_by_temperature(lm: CausalLM) -> weakref.WeakValueDictionary[float, CausalLM]:
    """An empty cache; weak, because each copy holds its origin."""
    return weakref.WeakValueDictionary()


def _temper_table(model: MarkovLM, temperature: float) -> MarkovLM:
    """The table whose rows are proportional to rows ** (1 / temperature)."""
    if model.mixture is not None:
        raise InvalidArgumentError(
            f"`temperature` must be 1 where the reference is a table of low rank, got {temperature}."
        )
    rows = (model.rows.double().log() / temperature).softmax(-1).cpu().numpy()
    return MarkovLM.from_probs(rows, order=model.config.order, eos_token_id=model.config.eos_token_id)


def to_device(lm: CausalLM, device: str, dtype: str) -> CausalLM:
    """The model itself where it is on that device in that dtype; else a copy, one for as long as `lm` lives."""
    check_choice("dtype", dtype, DTYPES)
    resolved = resolve_device(device)
    if lm.device.type == resolved.type and lm.dtype == DTYPES[dtype]:
        return lm
    return lm.remember(_copy_to_device, str(resolved), DTYPES[dtype])


def as_named(lm: CausalLM, device: str, dtype: str) -> CausalLM:
    """The model itself; or a copy, where a device other than its own is named or another dtype than float32.

    "auto" and "float32" stand for the device and the dtype that it has: they are what is given where nothing is said.
    """
    check_choice("dtype", dtype, DTYPES)
    where = lm.device if device == "auto" else resolve_device(device)
    kind = lm.dtype if dtype == "float32" else DTYPES[dtype]
    if where.type == lm.device.type and kind == lm.dtype:
        return lm
    return lm.remember(_copy_to_device, str(where), kind)


def _copy_to_device(lm: CausalLM, device: str, dtype: torch.dtype) -> CausalLM:
    return CausalLM(copy.deepcopy(lm.model).to(device, dtype), lm.tokenizer, lm.temperature)
