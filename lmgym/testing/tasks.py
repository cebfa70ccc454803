"""Checks a task of your own as the built-in tasks are checked."""

from __future__ import annotations

import math
import warnings

import gymnasium as gym
import torch
from gymnasium.utils.env_checker import check_env

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import LmGymError
from lmgym.evaluation import evaluate
from lmgym.models.policy import CausalPolicy
from lmgym.optimum import find_known
from lmgym.tasks import Task, make_task

_ENV_ID = "lmgym/RLHF-v0"


def check_task(task: str | Task, *, samples: int = 8, seed: int = 0) -> None:
    """Checks what agents rely on in a task.

    Its parts load and fit together. It has the splits "train" and "test", equal or without a common prompt. Its
    environment passes Gymnasium's own checker without a warning. The reference has no KL to itself, and the scores of
    its samples are finite. A known optimum lies above the reference and agrees with those samples.

    Args:
        task: a name, or a Task.
        samples: episodes of the reference a prompt, on at most 64 prompts of the test split.
        seed: of the samples.

    Raises:
        LmGymError: with the first thing that is wrong.
    """
    task = make_task(task)
    task.validate()
    if not {"train", "test"} <= set(task.prompts):
        raise LmGymError(f"`prompts` must have the splits 'train' and 'test', got {sorted(task.prompts)}.")
    train = set(task.prompts["train"])
    test = set(task.prompts["test"])
    if train & test and train != test:
        raise LmGymError(f"The splits must be equal or disjoint, and share {len(train & test)} prompts.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            check_env(gym.make(_ENV_ID, task=task, device="cpu").unwrapped, skip_render_check=True)
        except (Warning, AssertionError) as error:
            raise LmGymError(f"The env does not pass gymnasium's check_env: {error}") from error
    envs = gym.make_vec(_ENV_ID, task=task, split="test", device="cpu")
    assert isinstance(envs, RLHFVectorEnv)
    generator = torch.Generator().manual_seed(seed)
    found = evaluate(CausalPolicy(envs.engine.lm), envs, samples=samples, prompts=64, generator=generator)
    if task.kl_coef > 0 and abs(found.metrics["kl"].mean) > 1e-3 * task.max_new_tokens:
        raise LmGymError(f"The reference must have KL 0 to itself, got {found.metrics['kl'].mean:.3g} nats.")
    optimum = find_known(task, "test")
    if optimum is None:
        return
    if not optimum.lower <= optimum.value <= (math.inf if optimum.upper is None else optimum.upper):
        raise LmGymError(f"The optimum's value must lie within its bounds, got {optimum}.")
    if optimum.value < optimum.reference - 1e-9:
        raise LmGymError(f"The optimum must not lie below the reference's return, got {optimum}.")
    mean = found.metrics["return"]
    half = (mean.high - mean.low) / 2
    if len(test) <= 64 and abs(mean.mean - optimum.reference) > 2.5 * half + 1e-3:
        raise LmGymError(
            f"The reference's return is stored as {optimum.reference:.4g}, and its samples gave {mean.mean:.4g}, "
            f"95 % interval {mean.low:.4g} to {mean.high:.4g}."
        )
