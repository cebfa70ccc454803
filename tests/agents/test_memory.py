"""The memory that training takes, foretold and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest
import torch
from conftest import gpt2, learn, word_count, word_tokenizer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from agents.algorithms.ppo import PPO, PPOConfig
from agents.memory import Sizes, check_fits, estimate, free_bytes, kept_bytes, peak
from agents.on_policy import memory_sizes
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM, freeze
from lmgym.tasks import Task

WORDS = [f"w{i}" for i in range(397)]
V = len(WORDS) + 3
PROMPT = 8
HORIZON = 24


def llama(width: int, layers: int) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=V, hidden_size=width, num_hidden_layers=layers, intermediate_size=2 * width, **heads
    )
    with torch.random.fork_rng():
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def agent_of(model: nn.Module, dtype: str = "float32", device: str = "cpu", **config: Any) -> PPO:
    """PPO over episodes that are all of full length."""
    lm = CausalLM(freeze(model.to(getattr(torch, dtype))), word_tokenizer(WORDS))
    task = Task(
        name="t",
        model=lm,
        reward=word_count,
        prompts={"train": [" ".join(WORDS[i : i + PROMPT]) for i in range(8)]},
        kl_coef=0.1,
        max_new_tokens=HORIZON,
        min_new_tokens=HORIZON - 1,
    )
    envs = RLHFVectorEnv(1, autoreset_mode="SameStep", task=task, device=device, dtype=dtype)
    sizes = {"batch_size": 32, "micro_batch_size": 16, "epochs": 1, "minibatches": 2}
    return PPO(envs, PPOConfig(**sizes | config))


def peak_on_cpu(run: Callable[[], object]) -> int:
    """Most bytes that torch holds at a time of what a function allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("family", "dtype", "config"),
    [
        ("gpt2", "float32", {}),
        ("llama", "bfloat16", {"micro_batch_size": 4}),
        ("gpt2", "float32", {"gradient_checkpointing": True}),
        ("llama", "float32", {"critic": "reference"}),
        ("llama", "float32", {"autocast": "bfloat16"}),
    ],
    ids=str,
)
def test_a_run_takes_what_was_estimated(family: str, dtype: str, config: dict[str, Any]) -> None:
    model = gpt2(V, n_embd=64, n_layer=3, n_positions=40) if family == "gpt2" else llama(64, 3)
    agent = agent_of(model, dtype, **config)
    estimated = peak(estimate(memory_sizes(agent)))
    measured = peak_on_cpu(lambda: learn(agent, 1))
    assert measured <= estimated <= 1.8 * measured


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"gradient_checkpointing": True}),
        ("float32", {"autocast": "bfloat16"}),
    ],
    ids=str,
)
def test_a_run_on_a_gpu_takes_what_was_estimated(dtype: str, config: dict[str, Any]) -> None:
    agent = agent_of(llama(512, 8), dtype, "cuda", batch_size=256, micro_batch_size=128, **config)
    estimated = peak(estimate(memory_sizes(agent)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learn(agent, 1)
    measured = torch.cuda.max_memory_allocated() - before
    assert 0.9 * measured <= estimated <= 2 * measured
    assert free_bytes(agent.policy.device) > 0


def test_a_table_has_no_keys_and_its_residual_has_layers() -> None:
    envs = gym.make_vec("lmgym/Keyword-8-v0", num_envs=1)
    sizes = memory_sizes(PPO(envs, PPOConfig(batch_size=8)))
    assert sizes.cached == 0
    assert sizes.kept > 0


# Of a linear layer (3 -> 2) autograd keeps the input, and of an exponential the output.
def test_bytes_that_are_kept_are_those_of_inputs_and_outputs() -> None:
    layer = nn.Linear(3, 2)
    x = torch.ones(5, 3)
    assert kept_bytes(lambda: layer(x).exp().sum(), layer.parameters()) == (5 * 3 + 5 * 2) * 4


SIZES = Sizes(
    batch_size=8,
    micro_batch_size=2,
    prompt=3,
    horizon=5,
    vocabulary=10,
    trainable=100,
    trainable_bytes=400,
    element=4,
    kept=1000,
    inside=0,
    cached=16,
)


def test_the_parts_of_an_estimate() -> None:
    parts = estimate(SIZES)
    assert parts["optimiser"] == 2 * 4 * 100
    assert parts["gradients"] == 400
    assert parts["layers"] == 2 * (1000 + 2 * 5 * 10 * 4)
    assert parts["cache"] == 8 * 32 * 16  # rings have a multiple of 32 columns
    assert parts["logits"] == 8 * 10 * (2 * 4 + 3 * 4)
    half = replace(SIZES, trainable_bytes=200, element=2)
    assert estimate(half)["gradients"] == 200 + 400  # in float32 for the copies of the weights
    assert estimate(replace(SIZES, micro_batch_size=100))["layers"] == 8 * (1000 + 400)
    assert estimate(replace(SIZES, cast=50))["layers"] == parts["layers"] + 50
    assert parts["graphs"] == 0
    graphed = replace(SIZES, has_graphs=True)
    # 2 rows of 8 tokens in a graph of 4 rows of 16, and one that is too large.
    assert estimate(graphed)["graphs"] == 400 + (4 * 16 - 2 * 8) * 1000 // 8
    long = replace(graphed, horizon=9997)
    assert estimate(long)["graphs"] == 400 + 8192 * 1000 // 10000


def test_what_does_not_fit_is_refused_with_what_to_lower() -> None:
    cpu = torch.device("cpu")
    parts = {"layers": 40 * 10**9, "optimiser": 2 * 10**9, "gradients": 10**9, "cache": 3 * 10**9, "logits": 10**8}
    check_fits(parts, 50 * 10**9, cpu)
    with pytest.raises(InvalidArgumentError) as caught:
        check_fits(parts, 30 * 10**9, cpu)
    message = str(caught.value)
    assert "about 48.4 GB where 30.0 GB are free (in GB: layers 40.0, cache 3.0," in message
    assert "lower `micro_batch_size`, or set `gradient_checkpointing` to true; or lower `batch_size`" in message
