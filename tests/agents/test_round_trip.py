"""Save, load and predict of every agent of `conf/agent` that this project writes itself, on one tiny causal LM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyProblem, shifted
from shipped import FIXED, ON_POLICY, SUPERVISED, agents_of, class_of, fields_of
from transformers import AutoModelForCausalLM

from agents.agent import PolicyAgent
from agents.algorithms.nlpo import NLPO
from agents.fixed import FixedPolicyAgent
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models.policy import CausalPolicy
from lmgym.tasks import Task

LEARNERS = ON_POLICY | SUPERVISED
FOLLOWERS = agents_of(FixedPolicyAgent)  # of a policy that is given
NUMBERS = {"batch_size": 16, "epochs": 1, "minibatches": 1, "group_size": 4, "n": 4, "lr": 1e-2, "mask_update_every": 1}


@pytest.fixture(scope="module")
def task() -> Task:
    return TinyProblem().task


def envs_of(task: Task, rows: int, group: int = 1) -> RLHFVectorEnv:
    return RLHFVectorEnv(rows, group_size=group, autoreset_mode="SameStep", task=task, split="train", device="cpu")


def agent_of(name: str, task: Task, seed: int) -> Any:
    """A small agent; one that learns fine-tunes a copy of the reference."""
    kind = class_of(name)
    config = kind.Config(**fields_of(kind, NUMBERS))
    return kind(envs_of(task, config.num_envs, getattr(config, "responses", 1)), config, seed=shifted(seed))


def check_weights(agent: Any, directory: Path, observation: dict[str, Any]) -> None:
    """What is in a directory is a causal LM of Hugging Face's with the logits of the policy, and not the reference's.

    Args:
        agent: with a fine-tuned policy. directory: that it was saved in.
        observation: of the start of episodes.
    """
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    horizon = agent.envs.engine.horizon
    ids, mask = (torch.as_tensor(observation[key])[:, :-horizon] for key in ("input_ids", "attention_mask"))
    with torch.no_grad():
        rows = [model(input_ids=row[seen == 1][None]).logits[:, -1] for row, seen in zip(ids, mask, strict=True)]
    saved = torch.cat(rows)
    own = getattr(agent, "unmasked", agent.policy)
    torch.testing.assert_close(saved, own.begin(ids, mask, horizon).logits, rtol=0, atol=1e-5)
    reference = CausalPolicy(agent.envs.engine.lm).begin(ids, mask, horizon).logits
    assert (saved - reference).abs().max() > 1e-3
    if not isinstance(agent, NLPO):  # whose distribution is of a mask too
        assert np.array_equal(agent.predict(observation, deterministic=True)[0], saved.argmax(-1).numpy())


def check_next_logits(agent: Any, observation: dict[str, Any]) -> None:
    """An agent's logits of the next tokens are those of its policy, stepped along the responses from their prompts."""
    if isinstance(agent, PolicyAgent):
        ids = torch.as_tensor(observation["input_ids"])
        mask = torch.as_tensor(observation["attention_mask"]).bool()
        with torch.inference_mode():
            stepped = PolicyAgent.next_logits(agent, ids, mask)
            torch.testing.assert_close(agent.next_logits(ids, mask), stepped, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*LEARNERS, *FIXED])
def test_a_loaded_agent_of_another_seed_acts_as_the_saved_one(name: str, task: Task, tmp_path: Path) -> None:
    agent = agent_of(name, task, seed=1)
    other = agent_of(name, task, seed=2)
    agent.learn(1)  # a batch
    envs = envs_of(task, 32)
    observation, _ = envs.reset(seed=0)
    agent.predict(observation)  # what it draws from has moved on as well
    assert (agent.num_timesteps > 0) == (name not in FOLLOWERS)
    agent.save(tmp_path / "checkpoint")
    assert not np.array_equal(*(each.predict(observation)[0] for each in (agent, other)))
    if name in LEARNERS:
        check_weights(agent, tmp_path / "checkpoint", observation)
    for each in (agent, other):
        each.load(tmp_path / "checkpoint")
    assert other.num_timesteps == agent.num_timesteps
    seen: set[int] = set()
    for _ in range(task.max_new_tokens):
        check_next_logits(agent, observation)
        for deterministic in (True, False):
            actions, same = (each.predict(observation, deterministic=deterministic)[0] for each in (agent, other))
            assert np.array_equal(actions, same)
        seen |= set(actions.tolist())
        observation, *_ = envs.step(actions)
    assert len(seen) > 1
