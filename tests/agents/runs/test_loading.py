"""Policies out of run directories, whatever they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import hydra
import pytest
import torch
from extras import needs_contrib, needs_peft

import agents
import agents.train
from agents.checkpoint import replacing
from agents.runs.directory import write_config
from agents.runs.plan import build, check, plain
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.rollout import collect

CONF = Path(__file__).parents[3] / "conf"
SMALL = ["agent.batch_size=8", "agent.minibatches=1", "agent.epochs=1", "agent.lr=0.01"]
NETWORK = [*SMALL, "agent.policy=mlp", "agent.width=8"]
SB3 = ["agent.n_envs=8", "agent.n_steps=8", "agent.policy=mlp", "agent.width=8"]
KINDS = {
    "ppo, a copy of the model": ["agent=ppo", "task=reviews", *SMALL],
    "ppo, an adapter": ["agent=ppo", "task=reviews", "agent.policy=lora", "agent.lora_rank=2", *SMALL],
    "ppo, a network on a table": ["agent=ppo", *NETWORK],
    "nlpo": ["agent=nlpo", *NETWORK],
    "dpo": ["agent=dpo", "agent.batch_size=8", "agent.policy=mlp", "agent.width=8"],
    "sb3 ppo": ["agent=sb3_ppo", "agent.batch_size=32", "agent.n_epochs=1", *SB3],
    "sb3 dqn": ["agent=sb3_dqn", "agent.n_envs=8", "agent.policy=mlp", "agent.width=8"],
    "sb3 maskable ppo": ["agent=sb3_maskable_ppo", "agent.batch_size=32", "agent.n_epochs=1", *SB3],
    "optimal": ["agent=optimal"],
    "reference": ["agent=reference"],
    "uniform": ["agent=uniform"],
}
MARKS = {"ppo, an adapter": [needs_peft], "sb3 maskable ppo": [needs_contrib]}


def run_of(directory: Path, *overrides: str, steps: int = 1) -> Any:
    """A run directory with a checkpoint of an agent that has learned a little, and the agent."""
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        values = plain(hydra.compose("train", overrides=["task=echo-2", "device=cpu", *overrides]))
    directory.mkdir()
    write_config(directory, values)
    agent = build(check(values))
    agent.learn(steps)
    with replacing(directory / "checkpoint") as scratch:
        getattr(agent, "write", agent.save)(scratch)
    return agent


def draw(policy: Any, envs: Any) -> Any:
    return collect(envs, policy, [envs.engine.prompts[0]] * 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, [])) for kind in KINDS])
def test_the_policy_of_a_run_is_that_of_its_agent(kind: str, tmp_path: Path) -> None:
    agent = run_of(tmp_path / "run", *KINDS[kind])
    policy = agents.load_policy(tmp_path / "run")
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=agent.envs.unwrapped.task, device="cpu")
    envs.reset(seed=0)
    expected = draw(agent.policy, envs)
    found = draw(policy, envs)
    assert torch.equal(found.response_ids, expected.response_ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    if kind not in ("reference", "optimal", "uniform"):
        assert agents.load_agent(tmp_path / "run" / "checkpoint").num_timesteps == agent.num_timesteps > 0


def test_best_of_n_is_an_agent_and_no_policy(tmp_path: Path) -> None:
    run_of(tmp_path / "run", "agent=best_of_n")
    assert agents.load_agent(tmp_path / "run").config.n == 16
    with pytest.raises(InvalidArgumentError, match=r"`run` must be of an agent that chooses token by token"):
        agents.load_policy(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LmGymError, match=r"must be a run directory, and has no config.yaml"):
        agents.load_policy(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'"):
        _ = agents.load_polcy  # type: ignore[attr-defined]


def test_its_code_is_not_trusted(tmp_path: Path) -> None:
    run_of(tmp_path / "run", "agent=reference")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("reward: null", "reward: conftest:word_count"))
    with pytest.raises(InvalidArgumentError, match="trust=conftest"):
        agents.load_policy(tmp_path / "run")
    assert agents.load_agent(tmp_path / "run", trust="conftest").envs.engine.reward.__name__ == "word_count"
