"""What all processes of `benchmarks.ppo_speed` read: models with random weights, prompts and texts, as local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from benchmarks.gpu_models import word_tokenizer
from lmgym.tasks import make_task

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64},
    "2 x 128": {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 512},
    "6 x 512": {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 50_257},
}
PROMPT = 12  # tokens
COUNT = 256  # prompts, and texts
PROMPTS = "prompts.json"
TEXTS = "texts.jsonl"
SPECIAL = 3  # pad, EOS and unknown: ids 0, 1 and 2


def write_inputs(directory: Path, size: str, horizon: int) -> dict[str, Any]:
    """The files of a size, made where they are missing: what a `Spec` says of them."""
    if size == "reviews":
        return _write_reviews(directory, horizon)
    found = {"model": "model", "reward": "reward", "prompts": PROMPTS, "texts": TEXTS}
    if not (directory / TEXTS).exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write_models(directory, SIZES[size], PROMPT + horizon)
        rng = np.random.default_rng(0)
        words = rng.integers(SPECIAL, SIZES[size]["vocab_size"], (COUNT, PROMPT + horizon - 1))
        _write_texts(directory, [[f"w{i}" for i in row] for row in words.tolist()])
    return {name: str(directory / file) for name, file in found.items()} | {"horizon": horizon}


def _write_models(directory: Path, shape: dict[str, int], positions: int) -> None:
    """A GPT-2 that never ends a response, and a reward model of one thin layer."""
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    common = {"n_positions": positions, **ends, **dropout}
    thin = {**shape, "n_layer": 1, "n_embd": 32, "n_head": 2}
    tokenizer = word_tokenizer(shape["vocab_size"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**shape, **common))
        reward = GPT2ForSequenceClassification(GPT2Config(**thin, **common, num_labels=1))
        _forbid(model, SPECIAL)
    for name, made in (("model", model), ("reward", reward)):
        made.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


@torch.no_grad()
def _forbid(model: Any, count: int) -> None:
    """Makes the first `count` tokens all but impossible: logits of about -30, by the bias of the last layer norm.

    So responses have their full length without any library being told.
    """
    direction = torch.randn(model.config.n_embd)
    direction /= direction.norm()
    model.transformer.ln_f.bias += 6 * direction
    model.transformer.wte.weight[:count] = -5 * direction


def _write_texts(directory: Path, words: list[list[str]]) -> None:
    """Prompts, and each with the rest of its words and an EOS as its completion."""
    prompts = [" ".join(row[:PROMPT]) for row in words]
    rows = []
    for prompt, row in zip(prompts, words, strict=True):
        rows.append({"prompt": prompt, "completion": " " + " ".join(row[PROMPT:]) + " <eos>"})
    (directory / PROMPTS).write_text(json.dumps(prompts), encoding="utf-8")
    (directory / TEXTS).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def _write_reviews(directory: Path, horizon: int) -> dict[str, Any]:
    """The models and the training prompts of the task `reviews`, whose responses end by themselves."""
    task = make_task("reviews")
    directory.mkdir(parents=True, exist_ok=True)
    prompts = directory / PROMPTS
    prompts.write_text(json.dumps([str(prompt) for prompt in task.prompts["train"]]), encoding="utf-8")
    return {
        "model": str(task.model),
        "reward": str(task.reward),
        "prompts": str(prompts),
        "texts": "",
        "horizon": min(horizon, task.max_new_tokens),
        "is_fixed": False,
    }
