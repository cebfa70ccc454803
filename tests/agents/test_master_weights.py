"""Half-precision weights learn by float32 copies: small steps add up, and a resumed run has the copies."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, tiny_lm, word_tokenizer
from shipped import ON_POLICY, SUPERVISED, fields_of
from torch import Tensor, nn
from transformers import LlamaConfig

from agents.algorithms.ppo import PPO
from agents.master_weights import MasterWeights
from agents.sb3.agent import SB3Agent
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models.causal import CausalLM
from lmgym.tasks.base import Task

LR = 1e-6
STEPS = 12
HALVES = [torch.bfloat16, torch.float16]


def weights_of(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 30), (30,), (7, 3))
    return [nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]


def descend(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps along gradients that are the same each time, of either sign, and exact in bfloat16."""
    for _ in range(steps):
        for i, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(i)
            weight.grad = torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) - 0.5
        optimizer.step()


def moved(now: list[Tensor], before: list[Tensor]) -> float:
    """The share of the numbers that are no longer what they were."""
    changed = sum(int((a != b).sum()) for a, b in zip(now, before, strict=True))
    return changed / sum(x.numel() for x in before)


def copies(tensors: Any) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


# -- the optimiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD])
def test_the_copies_take_the_steps_of_float32_weights(dtype: torch.dtype, kind: Any) -> None:
    weights = weights_of(dtype)
    twins = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = kind(weights, lr=LR)
    other = kind(twins, lr=LR)
    masters = MasterWeights(optimizer)
    descend(weights, optimizer, STEPS)
    descend(twins, other, STEPS)
    for weight, master, twin in zip(weights, masters.of(weights), twins, strict=True):
        assert torch.equal(master, twin)
        assert torch.equal(weight, twin.to(dtype))
        assert weight.grad is None


def test_small_steps_move_the_copies_and_in_time_the_weights() -> None:
    weights = weights_of(torch.bfloat16)
    start = copies(weights)
    optimizer = torch.optim.Adam(weights, lr=LR)
    masters = MasterWeights(optimizer)
    before = copies(masters.of(weights))
    descend(weights, optimizer, STEPS)
    assert moved(masters.of(weights), before) > 0.99
    assert moved(weights, start) < 0.5
    descend(weights, optimizer, 400)
    assert moved(weights, start) > 0.9


def test_without_copies_bfloat16_weights_stay_where_they_are() -> None:
    weights = weights_of(torch.bfloat16)
    start = copies(weights)
    descend(weights, torch.optim.Adam(weights, lr=LR), STEPS + 400)
    assert moved(weights, start) < 0.1


def test_float32_weights_have_no_copies() -> None:
    weights = weights_of(torch.float32)
    optimizer = torch.optim.Adam(weights, lr=LR)
    assert all(a is b for a, b in zip(MasterWeights(optimizer).of(weights), weights, strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], weights, strict=True))
    descend(weights, optimizer, 1)
    assert weights[0].grad is not None
    assert all("master" not in state for state in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("steps", [0, STEPS])
def test_the_state_of_the_optimiser_holds_the_copies(steps: int) -> None:
    weights = weights_of(torch.bfloat16)
    others = weights_of(torch.bfloat16)
    optimizer = torch.optim.Adam(weights, lr=LR)
    other = torch.optim.Adam(others, lr=LR)
    masters = MasterWeights(optimizer)
    other_masters = MasterWeights(other)
    descend(weights, optimizer, steps)
    for weight, x in zip(others, weights, strict=True):
        weight.data.copy_(x)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    descend(weights, optimizer, STEPS)
    descend(others, other, STEPS)
    for a, b in zip(masters.of(weights), other_masters.of(others), strict=True):
        assert torch.equal(a, b)


def test_a_weight_that_was_changed_elsewhere_goes_on_from_there() -> None:
    weights = weights_of(torch.bfloat16)
    optimizer = torch.optim.SGD(weights, lr=LR)
    masters = MasterWeights(optimizer)
    descend(weights, optimizer, 3)
    kept = masters.of(weights)[0].detach().clone()
    with torch.no_grad():
        weights[0][0] = 0.5
    descend(weights, optimizer, 1)
    assert (masters.of(weights)[0][0] - 0.5).abs().max() <= LR
    assert (masters.of(weights)[0][1:] - kept[1:]).abs().max() <= LR


# -- every agent -----------------------------------------------------------------------------------------------------


@functools.cache
def reference() -> CausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = len(word_tokenizer())
    return tiny_lm(LlamaConfig(**shape, vocab_size=size, num_key_value_heads=2, max_position_embeddings=32))


def count_good(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(completion.split().count("good")) + 0.1 * len(completion.split()) for completion in completions]


ONCE = {"batch_size": 8, "epochs": 1, "minibatches": 1, "lr": LR, "lr_schedule": "constant", "adam_eps": 1e-12}
ONCE |= {"group_size": 4, "n": 2, "max_kl": 1e-9, "max_kl_schedule": "constant", "fisher_fraction": 1.0}
STEPPED = {"n_envs": 4, "n_steps": 4, "learning_rate": LR, "lr_schedule": "constant"}
AGENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (kind, fields_of(kind, ONCE)) for name, kind in (ON_POLICY | SUPERVISED).items()},
    "ppo, a critic of its own": (PPO, fields_of(PPO, ONCE) | {"critic": "reference"}),
    "sb3 ppo": (SB3Agent, STEPPED | {"algorithm": "PPO", "n_epochs": 1, "batch_size": 16}),
    "sb3 a2c": (SB3Agent, STEPPED | {"algorithm": "A2C"}),
}


def agent_of(name: str, seed: int = 0) -> Any:
    kind, settings = AGENTS[name]
    config = kind.Config(**settings)
    prompts = {"train": [f"{a} {b}" for a in WORDS[2:6] for b in WORDS[2:6]]}
    task = Task(name="half", model=reference, reward=count_good, prompts=prompts, kl_coef=0.1, max_new_tokens=4)
    group = getattr(config, "responses", 1)
    rows = config.num_envs
    envs = RLHFVectorEnv(
        rows, group_size=group, autoreset_mode="SameStep", task=task, device="cpu", dtype="bfloat16", split="train"
    )
    return kind(envs, config, seed=seed)


def halves(agent: Any) -> list[nn.Parameter]:
    """The weights that learn and are in half precision."""
    networks = agent.model.policy if hasattr(agent, "model") else agent.policy
    return [p for p in networks.parameters() if p.requires_grad and p.dtype == torch.bfloat16]


def masters(agent: Any) -> MasterWeights:
    """The float32 copies of those weights."""
    return agent.masters if isinstance(agent, SB3Agent) else agent.updater.masters


def train(agent: Any, batches: int) -> None:
    count = 0

    def stop(step: int, metrics: dict[str, float]) -> bool:
        nonlocal count
        count += 1
        return count < batches

    agent.learn(10**9, stop)


@pytest.mark.parametrize("name", AGENTS)
def test_small_steps_of_an_agent_add_up(name: str) -> None:
    agent = agent_of(name)
    weights = halves(agent)
    assert weights
    before = copies(masters(agent).of(weights))
    start = copies(weights)
    assert all(x.dtype == torch.float32 for x in before)
    train(agent, STEPS // 2)
    now = masters(agent).of(weights)
    assert moved(now, before) > 0.9
    assert moved(weights, start) < 0.5
    for weight, master in zip(weights, now, strict=True):
        assert torch.equal(weight, master.bfloat16())


@pytest.mark.parametrize("name", AGENTS)
def test_a_resumed_run_has_the_copies(name: str, tmp_path: Path) -> None:
    agent = agent_of(name)
    other = agent_of(name, seed=1)
    train(agent, 2)
    agent.save(tmp_path / "checkpoint")
    other.load(tmp_path / "checkpoint")
    for a, b in zip(masters(agent).of(halves(agent)), masters(other).of(halves(other)), strict=True):
        assert torch.equal(a, b)
    if not name.startswith("sb3"):  # whose episodes in hand are no part of a checkpoint
        for each in (agent, other):
            train(each, 1)
        for a, b in zip(masters(agent).of(halves(agent)), masters(other).of(halves(other)), strict=True):
            assert torch.equal(a, b)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["num_timesteps"] > 0
