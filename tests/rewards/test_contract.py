"""What holds of every reward: the functions in `lmgym.rewards` and `lmgym.tasks`, and what the tasks pay."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import local_tasks

import lmgym.rewards
import lmgym.tasks
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.rewards.base import remove_noise
from lmgym.tasks import make_task

EPISODES = 6


def reward_functions() -> dict[str, Callable[..., Any]]:
    """The public functions with the signature of a reward, by import path."""
    found = {}
    for package in (lmgym.rewards, lmgym.tasks):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, function in inspect.getmembers(module, inspect.isfunction):
                own = function.__module__ == info.name and not name.startswith("_")
                if own and list(inspect.signature(function).parameters) == ["prompts", "completions", "columns"]:
                    found[f"{info.name}:{name}"] = function
    return found


FUNCTIONS = reward_functions()
FAMILIES = sorted({name.partition("-")[0]: name for name in reversed(local_tasks())}.values())


def check_reward(task: Any) -> None:
    """A score is a finite number, and does not depend on the other episodes of its batch."""
    envs = RLHFVectorEnv(1, task=task, split="test", kl_coef=0.0, device="cpu")  # rewards are then scores
    rng = np.random.default_rng(0)
    prompts = [envs.engine.prompts[i % len(envs.engine.prompts)] for i in range(EPISODES)]
    tokens = rng.integers(0, envs.single_action_space.n, (EPISODES, envs.engine.horizon))
    together = envs.replay(prompts, tokens).rewards
    alone = np.concatenate([envs.replay(prompts[i : i + 1], tokens[i : i + 1]).rewards for i in range(EPISODES)])
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_scores_an_episode_by_itself(path: str) -> None:
    check_reward(make_task("reviews", reward=FUNCTIONS[path]))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reward_of_a_task_scores_an_episode_by_itself(name: str) -> None:
    task = make_task(name)
    plain = remove_noise(task.reward)
    check_reward(task if plain is task.reward else make_task(name, reward=plain))


def test_a_score_that_depends_on_the_batch_is_seen() -> None:
    def ranked(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(i) for i in range(len(completions))]

    with pytest.raises(AssertionError):
        check_reward(make_task("reviews", reward=ranked))
