"""Adam with moments in 8 bits, beside Adam with moments in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import learn, weights

from agents.algorithms.ppo import PPO, PPOConfig
from agents.memory import estimate
from agents.on_policy import memory_sizes
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
CONFIG: dict[str, Any] = {"batch_size": 8, "minibatches": 2, "epochs": 1, "lr": 1e-3}


def agent_of(parts: dict[str, Any], seed: int = 0, dtype: str = "float32", **config: Any) -> PPO:
    envs = RLHFVectorEnv(1, autoreset_mode="SameStep", device="cpu", dtype=dtype, **parts)
    return PPO(envs, PPOConfig(**CONFIG | config), seed=seed)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is there")
def test_it_says_what_is_missing() -> None:
    with pytest.raises(InvalidArgumentError, match="`adam` must be one that is installed, got '8bit'"):
        PPOConfig(adam="8bit")


@needs_bitsandbytes
def test_steps_are_near_those_with_moments_in_float32(parts: dict[str, Any]) -> None:
    """Of the distance that the weights go; a weight of fewer than 4,096 numbers goes as in float32."""
    agents = [agent_of(parts, policy="transformer", width=64, adam=adam) for adam in ("pytorch", "8bit")]
    start = weights(agents[0])
    for agent in agents:
        learn(agent, 4)
    full, coarse = (weights(agent) - start for agent in agents)
    assert full.norm() > 0
    assert 0 < (coarse - full).norm() < 0.2 * full.norm()


@needs_bitsandbytes
def test_large_weights_have_moments_of_a_byte(parts: dict[str, Any]) -> None:
    agent = agent_of(parts, policy="transformer", width=64, adam="8bit")
    learn(agent, 1)
    for weight, state in agent.updater.optimizer.state.items():
        moments = (state["state1"], state["state2"])
        expected = torch.uint8 if weight.numel() >= 4096 else torch.float32
        assert all(x.dtype == expected and x.numel() == weight.numel() for x in moments)
    sizes = memory_sizes(agent)
    assert estimate(sizes)["optimiser"] == 2 * sizes.trainable


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_run(dtype: str, parts: dict[str, Any], tmp_path: Path) -> None:
    first = agent_of(parts, dtype=dtype, adam="8bit")
    learn(first, 2)
    first.save(tmp_path / "checkpoint")
    whole = learn(first, 2)
    second = agent_of(parts, seed=5, dtype=dtype, adam="8bit")
    second.load(tmp_path / "checkpoint")
    assert learn(second, 2) == whole
    assert torch.equal(weights(second), weights(first))
