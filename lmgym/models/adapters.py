"""Adapters (peft): directories with a small change to another model's weights, and the name of that model.

Loading one gives a whole model: the base with the adapter merged into its weights.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.models.hub import locate
from lmgym.models.loading import check_files, check_tokenizer, load_model, load_tokenizer, loading

_PREFIX = "base_model.model."  # of every weight in an adapter's file
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")

LoadBase = Callable[..., Any]


def load_pretrained(argument: str, name: str, auto_class: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokenizer, from a directory or hub name that holds a whole model or an adapter on one.

    An adapter without a tokenizer of its own has that of its base.

    Args:
        argument: what the name is called in messages. name: a directory or a hub name.
        auto_class: the transformers class that loads the model. dtype: of its weights.

    Raises:
        LmGymError: with what is missing, is damaged or does not belong together.
    """
    name = locate(argument, name)
    source = _tokenizer_source(argument, name)
    model = _load(argument, name, auto_class, dtype)
    tokenizer = load_tokenizer(argument, source)
    check_tokenizer(argument, source, model, tokenizer)
    return model, tokenizer


def tokenizer_source(argument: str, name: str) -> str:
    """Where the tokenizer of a model is: with it, or with the base of an adapter that has none of its own."""
    return _tokenizer_source(argument, locate(argument, name))


def _tokenizer_source(argument: str, name: str) -> str:
    """The same for a model that has been located: the hub is not asked again."""
    while is_adapter(name) and not has_file(name, "tokenizer_config.json"):
        name = base_of(argument, name)
    return name


def _load(
    argument: str, name: str, auto_class: Any, dtype: torch.dtype, elsewhere: Iterable[str] = (), **options: Any
) -> Any:
    """The model of that name, an adapter merged into its base; the rest as for `load_model`."""
    if not is_adapter(name):
        return load_model(argument, name, auto_class, dtype, elsewhere, **options)
    base = base_of(argument, name)

    def load_base(brought: set[str], **more: Any) -> Any:
        return _load(argument, base, auto_class, torch.float32, brought.union(elsewhere), **(more | options))

    return load_merged(argument, name, auto_class, load_base).to(dtype)


def is_adapter(name: str) -> bool:
    """Whether a directory or a hub name holds an adapter on another model."""
    return find_adapter_config_file(name) is not None


def has_file(name: str, file: str) -> bool:
    """Whether a directory or a hub name holds a file."""
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def base_of(argument: str, name: str) -> str:
    """Directory or hub name of the model that an adapter is on.

    A relative directory is looked for from where the program runs, then from the adapter's own.

    Raises:
        LmGymError: where no base is named, or it is not there.
    """
    check_files(argument, name)
    check_peft(argument, name)
    from peft import PeftConfig

    with loading(argument, name, "peft"):
        base = PeftConfig.from_pretrained(name, trust_remote_code=False).base_model_name_or_path
    where = f"`base_model_name_or_path` in the adapter_config.json of `{argument}` {name!r}"
    if not base:
        raise LmGymError(
            f"{where} must name the model that the adapter was trained on, and names none: write it there."
        )
    for directory in (base, os.path.join(name, base)):
        if os.path.isdir(directory):
            if os.path.realpath(directory) == os.path.realpath(name):
                raise LmGymError(f"{where} must name the model that the adapter was trained on, and names itself.")
            return str(directory)
    if os.path.isabs(base) or base.startswith(".") or base.count("/") > 1:
        raise LmGymError(f"{where} must name the model that the adapter was trained on, and there is no {base!r}.")
    return locate(argument, str(base))


def load_merged(argument: str, name: str, auto_class: Any, load_base: LoadBase) -> Any:
    """The base model of an adapter in float32, with the adapter merged into it.

    Args:
        argument: what the name is called in messages. name: of the adapter.
        auto_class: the transformers class of the model.
        load_base: loads the base; it is given the names of weights that the adapter replaces, and options for
            transformers.

    Raises:
        InvalidArgumentError: where peft is missing. LmGymError: for an adapter that does not fit.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    with loading(argument, name, "peft"):
        config = PeftConfig.from_pretrained(name, trust_remote_code=False)
        weights = load_peft_weights(name, "cpu")
    classifies = "SequenceClassification" in auto_class.__name__
    if config.task_type not in (None, "SEQ_CLS" if classifies else "CAUSAL_LM"):
        raise LmGymError(f"`{argument}` {name!r} is an adapter of another kind of model ({config.task_type}).")
    options = _head_options(weights) if classifies else {}
    base = load_base({weight.removeprefix(_PREFIX) for weight in weights}, **options)
    with loading(argument, name, "peft"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # which peft 0.21 reads
        _resize(base, weights)
        _untie(base, weights)
        adapted = PeftModel.from_pretrained(base, name, config=config, trust_remote_code=False)
        missing = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(weights)
        if missing:
            raise LmGymError(
                f"`{argument}` {name!r} lacks weights of its adapter: {sorted(missing)[0]}. Copy it again."
            )
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise LmGymError(
                f"`{argument}` {name!r} is an adapter that cannot be merged into its base ({config.peft_type}): train "
                "one of LoRA's kind."
            )
        model = adapted.merge_and_unload()
    model.name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
    if not classifies and has_file(name, "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(name, trust_remote_code=False)
    return model


def check_peft(argument: str, name: str) -> None:
    """Raises `InvalidArgumentError` where the package peft is missing, saying how to install it."""
    if importlib.util.find_spec("peft") is None:
        raise InvalidArgumentError(
            f"`{argument}` {name!r} is an adapter, which needs the package peft: pip install peft."
        )


def _head_options(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """How many labels the head in an adapter's file has, as an option for transformers."""
    heads = [x for weight, x in weights.items() if weight.endswith(_HEADS)]
    return {"num_labels": heads[0].shape[0]} if heads else {}


def _resize(base: Any, weights: Mapping[str, Tensor]) -> None:
    """Gives the base as many embeddings as the adapter has, where tokens were added before its training."""
    embeddings = base.get_input_embeddings()
    for path, module in base.named_modules():
        own = weights.get(f"{_PREFIX}{path}.weight")
        if module is embeddings and own is not None and own.shape[0] != embeddings.weight.shape[0]:
            base.resize_token_embeddings(own.shape[0])
            return


def _untie(base: Any, weights: Mapping[str, Tensor]) -> None:
    """Gives the LM head weights of its own where the adapter changes only one of the head and the embeddings."""
    embeddings = base.get_input_embeddings()
    head = base.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    paths = [path for path, module in base.named_modules() if module in (embeddings, head)]
    if any(weight.startswith(f"{_PREFIX}{path}.lora_") for weight in weights for path in paths):
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
