"""Models that leave the GPU during updates. Here they leave for nowhere: whoever reads one meanwhile reads NaN."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import learn, shifted
from extras import needs_peft
from shipped import ON_POLICY, fields_of
from torch import Tensor, nn

from agents import offload
from agents.algorithms.grpo import GRPO
from agents.algorithms.ppo import PPO, PPOConfig
from agents.on_policy import OnPolicyAgent
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.rewards.classifier import load_reward_model

SMALL = {"batch_size": 8, "group_size": 4, "epochs": 1, "minibatches": 1, "rollouts": 2, "scale": "batch"}
Away = dict[int, Tensor]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    """Numbers that are away now, by where NaN stands for them."""
    numbers: Away = {}

    def move_out(x: Tensor) -> Tensor:
        nothing = torch.full_like(x, torch.nan) if x.is_floating_point() else torch.zeros_like(x)
        numbers[nothing.data_ptr()] = x.clone()
        return nothing

    def move_back(x: Tensor, home: torch.device) -> Tensor:
        return numbers.pop(x.data_ptr()).to(home)

    monkeypatch.setattr(offload, "check_offload", lambda device: None)
    monkeypatch.setattr(offload, "move_out", move_out)
    monkeypatch.setattr(offload, "move_back", move_back)
    return numbers


def agent_of(kind: type[OnPolicyAgent], parts: dict[str, Any], gold: Any = None, **config: Any) -> OnPolicyAgent:
    made = kind.Config(**fields_of(kind, SMALL) | config)
    settings: dict[str, Any] = {"group_size": made.responses, "autoreset_mode": "SameStep", "device": "cpu"}
    envs = RLHFVectorEnv(made.num_envs, **settings, **parts)
    return kind(envs, made, seed=shifted(0))


def weights_of(model: nn.Module) -> int:
    return sum(x.nbytes for x in {*model.parameters(), *model.buffers()})


@pytest.mark.parametrize("name", ON_POLICY)
def test_no_update_reads_what_is_away(name: str, parts: dict[str, Any], away: Away) -> None:
    metrics = learn(agent_of(ON_POLICY[name], parts, offload=True), 1)[0]
    assert all(math.isfinite(x) for x in metrics.values())
    assert not away


@pytest.mark.parametrize("policy", ["finetune", pytest.param("lora", marks=needs_peft), "gru"])
def test_what_the_policy_reads_stays(policy: str, parts: dict[str, Any], away: Away) -> None:
    agent = agent_of(PPO, parts, policy=policy, offload=True)
    reference = agent.envs.engine.lm.model
    expected = weights_of(load_reward_model(parts["reward"], "cpu").model)
    expected += weights_of(reference) if policy == "finetune" else 0
    assert offload.count_bytes(agent.idle) == expected
    assert learn(agent, 2) == learn(agent_of(PPO, parts, policy=policy), 2)


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_a_reference_that_the_loss_reads_stays(estimator: str, parts: dict[str, Any], away: Away) -> None:
    agent = agent_of(GRPO, parts, kl_estimator=estimator, offload=True)
    reference = {id(x) for x in agent.envs.engine.lm.model.parameters()}
    assert reference.isdisjoint(map(id, agent.idle)) == (estimator == "exact")
    assert learn(agent, 2) == learn(agent_of(GRPO, parts, kl_estimator=estimator), 2)


def test_models_are_away_during_an_update_and_back_after_it(
    parts: dict[str, Any], away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(PPO, parts, offload=True)
    before = [x.clone() for x in agent.idle]
    seen = []
    update = agent.update
    monkeypatch.setattr(agent, "update", lambda batch: seen.append(len(away)) or update(batch))
    learn(agent, 1)
    assert seen == [len(agent.idle)]
    assert all(torch.equal(x, y) for x, y in zip(agent.idle, before, strict=True))

    def fail(batch: object) -> None:
        raise RuntimeError("in the midst of it")

    monkeypatch.setattr(agent, "update", fail)
    with pytest.raises(RuntimeError, match="in the midst"):
        learn(agent, 1)
    assert not away
    assert all(torch.equal(x, y) for x, y in zip(agent.idle, before, strict=True))


def test_it_is_refused_where_there_is_no_other_memory(parts: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="`offload` must be False where the models are on 'cpu'"):
        agent_of(PPO, parts, offload=True)
    assert not PPOConfig().offload
    assert dataclasses.replace(PPOConfig(), offload=True).offload


@pytest.mark.gpu
def test_a_gpu_gets_its_memory_back_meanwhile(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = PPOConfig(batch_size=8, minibatches=2, offload=True)
    envs = RLHFVectorEnv(1, autoreset_mode="SameStep", device="cuda", **parts)
    agent = PPO(envs, made, seed=0)
    plain = PPO(envs, dataclasses.replace(made, offload=False), seed=0)
    held = torch.cuda.memory_allocated()
    with offload.offloaded(agent.idle):
        assert held - torch.cuda.memory_allocated() >= offload.count_bytes(agent.idle) > 0
        assert all(x.device.type == "cpu" for x in agent.idle)
    assert all(x.device.type == "cuda" for x in agent.idle)
    assert learn(agent, 1)[0]["rollout/score"] == pytest.approx(learn(plain, 1)[0]["rollout/score"])
