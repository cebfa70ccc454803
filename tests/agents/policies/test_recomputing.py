"""Gradient checkpointing: the same gradients as without it, from less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import WORDS, learn, shifted, tiny_lm, weights, word_count
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.trpo import TRPO, TRPOConfig
from agents.policies.actor_critic import ActorCritic, Critic
from agents.policies.recomputing import recompute_layers
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.tasks import Task

V = len(WORDS) + 3
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 40}
# Two of them have dropout, which must stay off.
SHAPES: dict[str, PretrainedConfig] = {
    "GPT-2": GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, n_positions=40, **IDS),
    "Llama": LlamaConfig(vocab_size=V, num_key_value_heads=1, intermediate_size=24, **BLOCKS, **IDS),
    "OPT": OPTConfig(vocab_size=V, ffn_dim=24, word_embed_proj_dim=16, dropout=0.1, **BLOCKS, **IDS),
}


def envs_of(lm: CausalLM) -> RLHFVectorEnv:
    prompts = {"train": ["the film was", "a", "it was not the"]}
    task = Task(name="tiny", model=lm, reward=word_count, prompts=prompts, kl_coef=0.1, max_new_tokens=6)
    return RLHFVectorEnv(1, autoreset_mode="SameStep", task=task, device="cpu")


def trained(lm: CausalLM, **config: Any) -> Tensor:
    """Weights of PPO after two batches."""
    sizes = {"batch_size": 12, "micro_batch_size": 4, "epochs": 1, "minibatches": 2}
    agent = PPO(envs_of(lm), PPOConfig(**sizes, **config), seed=shifted())
    learn(agent, 2)
    return weights(agent)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        *((shape, {}) for shape in SHAPES),
        *(("Llama", config) for config in ({"critic": "reference"}, {"policy": "lora"}, {"policy": "transformer"})),
    ],
    ids=str,
)
def test_training_is_the_same_with_and_without(shape: str, config: dict[str, Any]) -> None:
    if config.get("policy") == "lora":
        pytest.importorskip("peft")
    lm = tiny_lm(SHAPES[shape])
    plain = trained(lm, **config)
    torch.testing.assert_close(trained(lm, gradient_checkpointing=True, **config), plain, rtol=0, atol=1e-6)


def test_second_derivatives_are_taken_through_layers_that_run_again() -> None:
    lm = tiny_lm(SHAPES["GPT-2"])
    found = []
    for gradient_checkpointing in (False, True):
        config = TRPOConfig(batch_size=12, gradient_checkpointing=gradient_checkpointing)
        agent = TRPO(envs_of(lm), config, seed=shifted())
        learn(agent, 1)
        found.append(weights(agent))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def kept_bytes(policy: ActorCritic, ids: Tensor) -> int:
    """What autograd keeps of a forward, weights left out, and without what is inside of layers that run again."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    ends = (torch.arange(len(ids)), torch.full((len(ids),), ids.shape[1] - 1))
    policy.read_at(ids, *ends)  # the first read tries out which forward to use
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        read = policy.read_at(ids, *ends)
    assert read.logits.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("critic", ["shared", "reference"])
def test_little_is_kept_of_a_forward(critic: Critic) -> None:
    lm = tiny_lm(SHAPES["GPT-2"])
    policy = ActorCritic(lm, critic)
    light = ActorCritic(lm, critic)
    recompute_layers(light.actor)
    if light.critic is not None:
        recompute_layers(light.critic)
    ids = torch.randint(2, V, (8, 20), generator=torch.Generator().manual_seed(0))
    trunks = 1 if light.critic is None else 2
    inputs = trunks * 3 * 8 * 20 * 16 * 4  # of the three layers, which are kept besides
    assert kept_bytes(light, ids) + inputs < kept_bytes(policy, ids) / 4


def test_a_network_without_such_layers_is_refused() -> None:
    envs = envs_of(tiny_lm(SHAPES["GPT-2"]))
    with pytest.raises(InvalidArgumentError, match="`gradient_checkpointing` must be False for a GRU"):
        PPO(envs, PPOConfig(policy="gru", gradient_checkpointing=True))
    with pytest.raises(InvalidArgumentError, match="`gradient_checkpointing` must be True or False, got 'no'"):
        PPOConfig(gradient_checkpointing="no")  # type: ignore[arg-type]
