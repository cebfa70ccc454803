"""What training starts from: a language model with a scalar head in place of its own, or a classification model."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lmgym.errors import InvalidArgumentError
from lmgym.models.activations import fuse_activations
from lmgym.models.causal import CausalLM
from lmgym.rewards.normalisation import score_head


def starting_model(model: Any, tokenizer: Any, generator: torch.Generator) -> Any:
    """A reward model to train: a copy, so that the model given is never changed.

    Args:
        model: a Hugging Face causal LM, whose trunk gets a new head (`reward_model_from`), or a sequence-classification
            model with one label, which goes on from its own.
        tokenizer: of the model.
        generator: draws a new head.

    Raises:
        InvalidArgumentError: for another model, and as `reward_model_from`.
    """
    check_start(model, tokenizer)
    if _is_classifier(model):
        started = copy.deepcopy(model).float()
        started.requires_grad_(True)
        return started.eval()
    return reward_model_from(model, generator, _pad_token(model.config, tokenizer)).float()


def check_start(model: Any, tokenizer: Any) -> None:
    """Raises `InvalidArgumentError` for a model that no reward model can start from.

    Args:
        model: as for `starting_model`. tokenizer: of the model.
    """
    if _is_classifier(model):
        score_head(model)
        return
    if getattr(model, "base_model", model) is model:
        raise InvalidArgumentError(
            f"`model` must be a causal LM or a sequence-classification model, got {type(model).__name__}."
        )
    if type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InvalidArgumentError(
            f"`model` must be a network that transformers can give a score head, and {type(model).__name__} is none."
        )
    pad = _pad_token(model.config, tokenizer)
    _check_pad(model.config.pad_token_id if pad is None else pad, model.config.eos_token_id)


def check_reference(task: str, lm: CausalLM, remedy: str) -> None:
    """Raises `InvalidArgumentError` for a task whose reference no reward model can start from.

    Args:
        task: by name. lm: its reference. remedy: what to give instead.
    """
    try:
        check_start(lm.model, lm.tokenizer)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"`task` must have a reference that a reward model can start from, got {task!r}: {remedy}. {error}"
        ) from error


def _is_classifier(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _pad_token(config: Any, tokenizer: Any) -> int | None:
    """A token that can stand for padding, and never ends a response; None where there is none."""
    names = ("pad_token_id", "unk_token_id", "bos_token_id")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for token in (config.pad_token_id, *(getattr(tokenizer, name, None) for name in names)):
        if token is not None and token not in ends:
            return int(token)
    return None


def reward_model_from(causal_lm: Any, generator: torch.Generator, pad_token_id: int | None = None) -> Any:
    """Makes a reward model out of a language model: its trunk with a scalar head instead of the LM head.

    Args:
        causal_lm: A Hugging Face causal LM.
        generator: Draws the head, from N(0, 1/(D+1)) with D the width of the trunk (Stiennon et al. 2020).
        pad_token_id: What the config of the reward model gets; None keeps that of the language model.

    Returns:
        A Hugging Face sequence-classification model with one label, the trunk copied.

    Raises:
        InvalidArgumentError: If there is no pad token, or EOS is it.
    """
    config = copy.deepcopy(causal_lm.config)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    _check_pad(pad, config.eos_token_id)
    config.pad_token_id = pad
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are all replaced below
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    model.base_model.load_state_dict(causal_lm.base_model.state_dict())
    head = score_head(model)
    with torch.no_grad():
        head.weight.normal_(std=1 / math.sqrt(head.in_features + 1), generator=generator)
    return fuse_activations(model).to(causal_lm.device).eval()


def _check_pad(pad: int | None, eos: Any) -> None:
    """Raises for a token that lmgym would read all the same, and transformers' own forward would not."""
    if pad is None or pad == eos:
        raise InvalidArgumentError(
            "`pad_token_id` must be set and differ from EOS, or the end of a response is invisible to transformers; "
            f"got {pad}, EOS {eos}."
        )


def add_adapter(model: Any, rank: int, alpha: float, generator: torch.Generator) -> Any:
    """Puts LoRA adapters into all linear layers of a reward model, whose head then learns beside them.

    Args:
        model: changed in place: only adapters and head learn. rank: r. alpha: of the scale alpha / rank.
        generator: of their weights.

    Returns:
        The peft model around it, whose `merge_and_unload` gives a plain model back.

    Raises:
        InvalidArgumentError: where the package peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InvalidArgumentError(
            f"`lora_rank` must be null without the package peft, got {rank}: pip install peft."
        ) from error
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=["score" if isinstance(getattr(model, "score", None), nn.Module) else "classifier"],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()
