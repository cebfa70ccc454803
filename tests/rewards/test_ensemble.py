"""Several reward models as one reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_texts import make_gpt2, make_tokenizer, toy_records

from agents.runs.inputs import notes_of
from lmgym.errors import LmGymError
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.saving import save_result
from lmgym.reward_models.training import train_reward
from lmgym.rewards.base import check_reward_name
from lmgym.rewards.classifier import load_reward_model
from lmgym.rewards.ensemble import EnsembleReward, load_ensemble
from lmgym.rewards.members import read_members

PROMPTS = ["the film was", "the soup was", "the film was"]
COMPLETIONS = [" good . <eos>", " dull", " bad bad . <eos>"]


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def constant(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [6.0] * len(completions)


def test_the_scores_are_the_mean_the_lowest_and_the_standard_deviation() -> None:
    table = np.array([length(PROMPTS, COMPLETIONS), constant(PROMPTS, COMPLETIONS), length(PROMPTS, COMPLETIONS)])
    members = [length, constant, length]
    for score, expected in (
        ("mean", table.mean(0)),
        ("minimum", table.min(0)),
        ("spread", np.sqrt(((table - table.mean(0)) ** 2).sum(0) / 2)),
    ):
        assert EnsembleReward(members, score)(PROMPTS, COMPLETIONS) == pytest.approx(expected.tolist())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LmGymError, match="`rewards` must be two at least, got 1"):
        EnsembleReward([length])
    with pytest.raises(LmGymError, match="Did you mean 'minimum'"):
        EnsembleReward([length, constant], "minimun")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RewardConfig(lr=1e-2, ensemble=3, ensemble_score="minimum", batch_size=8)
    result = train_reward(toy_records(20), make_gpt2(), make_tokenizer(), config)
    path = tmp_path_factory.mktemp("ensemble") / "reward"
    save_result(result, path, "the card")
    expected = result.reward()(PROMPTS, COMPLETIONS)
    assert load_ensemble(path, "cpu")(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    return path


def test_a_saved_ensemble_pays_each_of_its_scores(directory: Path) -> None:
    alone = [load_reward_model(str(directory / f"member-{i}"), "cpu")(PROMPTS, COMPLETIONS) for i in range(3)]
    table = np.array(alone)
    assert table.std(0).min() > 1e-4  # each member has a head of its own
    for name, expected in (
        ("mean", table.mean(0)),
        ("minimum", table.min(0)),
        ("spread", table.std(0, ddof=1)),
        (".", table.min(0)),
    ):
        check_reward_name(str(directory / name))
        found = load_ensemble(directory / name, "cpu")(PROMPTS, COMPLETIONS)
        assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_run_notices_that_a_member_has_changed(directory: Path) -> None:
    config = {"env": {"reward": str(directory / "spread")}}
    before = notes_of(config)
    weights = directory / "member-1" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert notes_of(config)["inputs"] != before["inputs"]
    finally:
        weights.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"members": ["member-0"]}, "two directories at least"),
        ({"members": ["member-0", 3]}, "two directories at least"),
        ({"members": ["member-0", "member-9"]}, "there is none at"),
        ({"members": ["member-0", "mean"]}, "config.json"),
        ({"members": ["member-0", "member-1"], "score": "best"}, "must be one of"),
    ],
)
def test_a_damaged_file_is_named(directory: Path, content: dict[str, Any], message: str) -> None:
    path = directory / "ensemble.json"
    saved = path.read_text()
    path.write_text(json.dumps(content))
    try:
        with pytest.raises(LmGymError, match=message):
            check_reward_name(str(directory))
    finally:
        path.write_text(saved)
    assert read_members(directory).score == "minimum"
