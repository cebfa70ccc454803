"""Streams of randomness: those of one run differ from each other, and from those of runs with neighbouring seeds."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import table_reward
from omegaconf import OmegaConf
from shipped import AGENTS, CONF, FIXED, ON_POLICY, class_of, fields_of

from agents import seeds
from agents.seeds import row_seeds, stream_seed, torch_generator
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.rewards.noise import NoisyReward
from lmgym.tasks.base import Task

LEARNERS = [name for name in AGENTS if name not in FIXED]
ROWS = 32
SMALL = {"batch_size": ROWS, "n_envs": ROWS, "n_steps": 4, "policy": "mlp", "width": 8, "lora_rank": 2, "group_size": 4}
PROMPTS = [" ".join(words) for length in (5, 6) for words in itertools.product("xyz", repeat=length)]  # 972
COMMON = 6  # prompts that two draws of 32 of 972 have in common: 1.05 on average, more than 6 once in 10,000 times


@functools.cache
def reference() -> CausalLM:
    return markov_lm(dirichlet_rows(np.random.default_rng(0), 4, 4, 2.0), ["x", "y", "z"])


def many_prompts(reward: Any) -> Task:
    return Task(name="many", model=reference, reward=reward, prompts={"train": PROMPTS}, kl_coef=0.4, max_new_tokens=4)


def make_agent(name: str, seed: int, collect: str = "episodes") -> Any:
    """A small agent of a file in conf/agent, on many prompts."""
    kind = class_of(name)
    settings = fields_of(kind, SMALL | {"collect": collect})
    if name.startswith("sb3_"):
        settings["algorithm"] = OmegaConf.load(CONF / f"{name}.yaml").algorithm
        del settings["batch_size"]  # of tokens, and A2C has none
    config = kind.Config(**settings)
    task = many_prompts(table_reward)
    group = getattr(config, "responses", 1)
    envs = RLHFVectorEnv(config.num_envs, group_size=group, autoreset_mode="SameStep", task=task, device="cpu")
    return kind(envs, config, seed=seed)


def first_prompts(agent: Any) -> set[tuple[int, ...]]:
    """The prompts of the first batch that an agent collects."""
    if hasattr(agent, "model"):
        prompt_ids = agent.model.env.reset()["input_ids"][:, : agent.envs.engine.width]
    elif hasattr(agent, "sample"):
        examples = agent.sample()[0]
        prompt_ids = getattr(examples, "episodes", examples).prompt_ids
    else:
        prompt_ids = agent.collect().prompt_ids
    return {tuple(row) for row in prompt_ids.tolist()}


def takes_steps(kind: Any) -> bool:
    """Whether an agent can collect step by step, as these tests make it."""
    try:
        kind.Config(**fields_of(kind, {"collect": "steps", "batch_size": ROWS, "group_size": 4}))
    except InvalidArgumentError:
        return False
    return True


ways = [(name, "episodes") for name in LEARNERS]
ways += [(name, "steps") for name, kind in ON_POLICY.items() if takes_steps(kind)]


@pytest.mark.parametrize(("name", "collect"), ways)
def test_runs_of_neighbouring_seeds_share_no_stream(name: str, collect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    reset = RLHFVectorEnv.reset

    def spy(self: RLHFVectorEnv, *, seed: Any = None, options: Any = None) -> Any:
        if seed is not None and seed != [None] * self.num_envs:
            used.append(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(RLHFVectorEnv, "reset", spy)
    agents = [make_agent(name, seed, collect) for seed in (0, 1, 4)]
    prompts = [first_prompts(agent) for agent in agents]
    for one, other in itertools.combinations(prompts, 2):
        assert len(one & other) <= COMMON
    every = [seed for row in used for seed in row]
    assert len(used) == len(agents)
    assert len(set(every)) == len(every) == sum(agent.envs.num_envs for agent in agents)
    states = {bytes(agent.generator.get_state().tolist()) for agent in agents}
    assert len(states) == len(agents)


@pytest.mark.parametrize(("name", "collect"), [("ppo", "episodes"), ("ppo", "steps"), ("dpo", "episodes")])
def test_a_run_is_its_seed_bit_by_bit(name: str, collect: str) -> None:
    ends = []
    for seed in (3, 3, 4):
        agent = make_agent(name, seed, collect)
        prompts = first_prompts(agent)
        agent.learn(agent.num_timesteps + 1)
        ends.append((prompts, torch.cat([x.detach().flatten() for x in agent.policy.network.parameters()])))
    assert ends[0][0] == ends[1][0] != ends[2][0]
    assert torch.equal(ends[0][1], ends[1][1])
    assert not torch.equal(ends[0][1], ends[2][1])


def test_streams_of_many_runs_are_all_different() -> None:
    keys = [value for name, value in vars(seeds).items() if name.isupper()]
    assert len(set(keys)) == len(keys)
    found = [stream_seed(seed, key) for seed in range(100) for key in keys]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**32 for seed in found)
    rows = [seed for run in range(20) for seed in row_seeds(run, 256)]
    assert len(set(rows)) == len(rows)
    assert row_seeds(5, 8) == row_seeds(5, 256)[:8]


def test_a_generator_is_of_its_seed_and_key() -> None:
    drawn = {tuple(torch.rand(4, generator=torch_generator(*of)).tolist()) for of in ((0, 1), (0, 2), (1, 1), (0, 1))}
    assert len(drawn) == 3


def test_the_weights_drawn_are_not_the_numbers_that_tokens_are_sampled_with() -> None:
    agent = make_agent("ppo", 0)
    other = make_agent("ppo", 1)
    weights = [torch.cat([x.detach().flatten() for x in each.policy.network.parameters()]) for each in (agent, other)]
    assert not torch.equal(*weights)
    sampled = torch.Generator().manual_seed(stream_seed(0, seeds.WEIGHTS))
    assert not torch.equal(sampled.get_state(), agent.generator.get_state())


def test_noise_in_the_reward_draws_other_numbers_than_the_prompts() -> None:
    noisy = NoisyReward(table_reward, 1.0)
    envs = RLHFVectorEnv(2, task=many_prompts(noisy), device="cpu")
    envs.reset(seed=[7, 8])
    state = noisy.get_state()
    for seed in (7, 8):
        assert state != np.random.default_rng(seed).bit_generator.state
    envs.reset(seed=[7, 9])
    assert noisy.get_state() == state
    envs.reset(seed=[8, 9])
    assert noisy.get_state() != state
