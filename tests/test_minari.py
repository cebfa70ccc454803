"""Minari data sets: what is loaded again is what was sampled, and the env pays the same for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch

import lmgym
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import token_rewards
from lmgym.minari import dataset_directory, write_minari
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.rollout import collect
from lmgym.wrappers import PolicyKL


def sampled(count: int, **settings: Any) -> tuple[Episodes, PolicyKL]:
    """Episodes of a policy that is not the reference, so that both halves of the KL count, and their single env."""
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, device="cpu", **settings)
    generator = torch.Generator().manual_seed(0)
    flat = Sampler(temperature=2.0)
    engine = envs.unwrapped.engine
    episodes = collect(envs.unwrapped, CausalPolicy(engine.lm), count, flat, generator)
    return episodes, PolicyKL(gym.make("lmgym/RLHF-v0", device="cpu", **settings))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "echo-2"},
        {"task": "stop-8", "truncate": True, "missing_eos_penalty": 0.5},
        {"task": "keyword-8", "dense_kl": False},
        {"task": "discount-0.9"},
    ],
)
def test_the_env_that_is_recovered_shows_and_pays_the_same(settings: dict[str, Any], root: Path) -> None:
    episodes, env = sampled(12, **settings)
    write_minari("lmgym/some/policy-v0", episodes, env)
    dataset = minari.load_dataset("lmgym/some/policy-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (12, episodes.num_tokens)
    again = dataset.recover_environment()
    stored = list(dataset.iterate_episodes())
    for known, episode in zip(dataset.storage.get_episode_metadata(range(12)), stored, strict=True):
        observation, _ = again.reset(options=known["options"])
        for t in range(len(episode)):
            for name, shown in observation.items():
                assert shown.dtype == episode.observations[name].dtype
                assert (shown == episode.observations[name][t]).all()
            action = {name: x[t] for name, x in episode.actions.items()}
            observation, reward, terminated, truncated, _ = again.step(action)
            assert reward == pytest.approx(episode.rewards[t], abs=1e-5)
            assert (terminated, truncated) == (episode.terminations[t], episode.truncations[t])
        assert terminated or truncated
        assert all((observation[name] == episode.observations[name][-1]).all() for name in observation)
    paid = token_rewards(episodes, env.unwrapped.kl_coef, dense=env.unwrapped.dense_kl).sum(1)  # type: ignore[attr-defined]
    assert np.allclose([episode.rewards.sum() for episode in stored], paid, atol=1e-5)


def test_a_prompt_from_elsewhere_comes_back_by_its_tokens(root: Path) -> None:
    episodes, env = sampled(1, task="echo-2")
    write_minari("lmgym/elsewhere-v0", replace(episodes, prompt_index=torch.tensor([-1])), env)
    dataset = minari.load_dataset("lmgym/elsewhere-v0")
    (known,) = dataset.storage.get_episode_metadata([0])
    observation, _ = dataset.recover_environment().reset(options=known["options"])
    assert (observation["input_ids"] == dataset[0].observations["input_ids"][0]).all()


def test_the_reference_scores_make_a_share_of_the_gain(root: Path) -> None:
    episodes, env = sampled(2, task="echo-2")
    optimum = lmgym.make_task("echo-2").optima["train"]
    write_minari("lmgym/echo-2/some-v0", episodes, env, optimum=optimum, algorithm_name="some")
    dataset = minari.load_dataset("lmgym/echo-2/some-v0")
    shares = minari.get_normalized_score(dataset, np.array([optimum.reference, optimum.value]))
    assert np.allclose(shares, [0, 1])
    assert dataset.storage.metadata["algorithm_name"] == "some"


def test_a_data_set_that_is_there_stays(root: Path) -> None:
    episodes, env = sampled(2, task="echo-2")
    directory = write_minari("lmgym/echo-2/some-v0", episodes, env)
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    with pytest.raises(InvalidArgumentError, match="`name` must be of a data set that is not there yet"):
        write_minari("lmgym/echo-2/some-v0", episodes, env)
    assert {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()} == before


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    episodes, env = sampled(3, task="echo-2")

    def fail(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_minari("lmgym/echo-2/some-v0", episodes, env, root=tmp_path, progress=fail)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not dataset_directory("lmgym/echo-2/some-v0", tmp_path).exists()


def test_several_data_sets_share_a_namespace_and_need_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    episodes, env = sampled(2, task="echo-2")
    for name in ("lmgym/echo-2/a-v0", "lmgym/echo-2/b-v0", "lmgym/c-v0"):
        directory = write_minari(name, episodes, env, root=tmp_path)
        assert json.loads((directory / "data" / "metadata.json").read_text())["dataset_id"] == name
    assert sorted(path.name for path in (tmp_path / "lmgym").iterdir()) == ["c-v0", "echo-2", "namespace_metadata.json"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert len(minari.list_local_datasets()) == 3
