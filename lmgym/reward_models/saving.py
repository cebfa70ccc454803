"""Writes trained reward models to the directory that `env.reward` takes, and reads a model to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lmgym.files import read_json, replace_directory
from lmgym.models.adapters import is_adapter, load_pretrained
from lmgym.models.hub import locate
from lmgym.models.loading import loading, quiet_loading
from lmgym.models.sharing import resolve_device
from lmgym.reward_models.training import RewardResult
from lmgym.rewards.members import ENSEMBLE_FILE, SCORES

CARD = "README.md"


def save_result(result: RewardResult, directory: Path, card: str) -> None:
    """Writes the model, its tokenizer and its card, all or nothing.

    Of an ensemble each member has a directory of its own, and `ensemble.json` says which of their scores is paid; the
    other ones are paid by the directories `mean`, `minimum` and `spread` in it.

    Args:
        result: what was trained. directory: what is written, or written anew. card: its README.md.
    """
    with replace_directory(directory) as scratch:
        (scratch / CARD).write_text(card, encoding="utf-8")
        if len(result.models) == 1:
            save_model(result.models[0], result.lesson.tokenizer, scratch)
            return
        members = [f"member-{number}" for number in range(len(result.models))]
        for model, member in zip(result.models, members, strict=True):
            save_model(model, result.lesson.tokenizer, scratch / member)
        _write_ensemble(scratch, members, result.lesson.config.ensemble_score)
        for score in SCORES:
            (scratch / score).mkdir()
            _write_ensemble(scratch / score, [f"../{member}" for member in members], score)


def _write_ensemble(directory: Path, members: list[str], score: str) -> None:
    content = {"members": members, "score": score}
    (directory / ENSEMBLE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes a model with its tokenizer as Hugging Face does."""
    with quiet_loading():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_start(name: str, device: str = "auto") -> tuple[Any, Any]:
    """A model to start from, a causal LM or a sequence-classification model, and its tokenizer.

    Args:
        name: a directory or a hub name, of an adapter too. device: where the model goes, in float32.

    Raises:
        LmGymError: for what cannot be loaded.
    """
    name = locate("model", name)
    kind = AutoModelForSequenceClassification if is_classifier(name) else AutoModelForCausalLM
    model, tokenizer = load_pretrained("model", name, kind, torch.float32)
    return model.to(resolve_device(device)).eval(), tokenizer


def is_classifier(name: str) -> bool:
    """Whether a directory or a hub name holds a sequence-classification model, or an adapter on one."""
    if is_adapter(name):
        path = Path(name) / "adapter_config.json"
        return path.is_file() and read_json(path).get("task_type") == "SEQ_CLS"
    with loading("model", name, "AutoConfig"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return any(str(kind).endswith("ForSequenceClassification") for kind in config.architectures or ())
