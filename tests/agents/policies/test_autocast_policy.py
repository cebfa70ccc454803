"""Policies that update with layers in bfloat16: what they learn, and what refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import WORDS, learn, shifted, tiny_lm, weights
from torch import nn
from transformers import GPT2Config

from agents.algorithms.nlpo import NLPO, NLPOConfig
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.trpo import TRPOConfig
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.tasks import Task

V = len(WORDS) + 3
SIZES: dict[str, Any] = {"batch_size": 32, "epochs": 2, "minibatches": 2, "lr": 1e-2}


def count_of_first_word(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [float(text.split().count(WORDS[0])) for text in completions]


def envs_of(dtype: torch.dtype = torch.float32) -> RLHFVectorEnv:
    config = GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=40, eos_token_id=1)
    lm = tiny_lm(config)
    lm.model.to(dtype)
    prompts = {"train": ["the film was", "a", "it was not the"]}
    task = Task(name="tiny", model=lm, reward=count_of_first_word, prompts=prompts, kl_coef=0.1, max_new_tokens=6)
    return RLHFVectorEnv(1, autoreset_mode="SameStep", task=task, device="cpu", dtype=str(dtype).split(".")[1])


@pytest.mark.parametrize(
    "config",
    [{}, {"critic": "reference"}, {"policy": "lora"}, {"gradient_checkpointing": True}, {"recompute_log_probs": True}],
    ids=str,
)
def test_a_first_step_is_that_of_float32_but_for_rounding(config: dict[str, Any]) -> None:
    if config.get("policy") == "lora":
        pytest.importorskip("peft")
    steps = []
    for autocast in (None, "bfloat16"):
        agent = PPO(envs_of(), PPOConfig(**SIZES, **config, autocast=autocast), seed=shifted())
        nn.init.normal_(agent.policy.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        agent.updater.step(agent.losses(agent.shape(agent.collect())))
        gradients = [p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        steps.append(torch.cat(gradients))
        assert weights(agent).dtype == torch.float32
    assert 0.99 < torch.cosine_similarity(*steps, dim=0) < 1
    assert not torch.equal(*steps)


def test_what_it_learns_is_as_good() -> None:
    returns: list[float] = []
    for autocast in (None, "bfloat16"):
        agent = PPO(envs_of(), PPOConfig(**SIZES, autocast=autocast), seed=shifted())
        history = learn(agent, 12)
        assert history[0]["train/ratio_error"] < 0.02  # decoding is in float32
        returns.append(sum(row["rollout/return"] for row in history[-3:]) / 3 - history[0]["rollout/return"])
    assert returns[0] > 2
    assert returns[1] == pytest.approx(returns[0], rel=0.2)


def test_a_mask_policy_does_as_its_policy() -> None:
    agent = NLPO(envs_of(), NLPOConfig(**SIZES, autocast="bfloat16"), seed=shifted())
    assert agent.policy.dtype == torch.bfloat16
    learn(agent, 1)


def test_where_it_makes_no_sense_it_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`autocast` must be null where the policy is a residual"):
        PPO(envs_of(), PPOConfig(policy="mlp", autocast="bfloat16"))
    with pytest.raises(InvalidArgumentError, match="`autocast` must be null where `dtype` of the env is not 'float32'"):
        PPO(envs_of(torch.bfloat16), PPOConfig(autocast="bfloat16"))
    with pytest.raises(InvalidArgumentError, match="`autocast` must be null for second derivatives"):
        TRPOConfig(autocast="bfloat16")
