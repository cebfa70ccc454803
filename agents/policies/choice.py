"""Which policy an agent learns: the choice that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from agents.agent import AgentConfig
from agents.policies.actor_critic import ActorCritic, Critic
from agents.policies.lora import ALL_LINEAR, LoRAPolicy, Start, check_peft, module_names
from agents.policies.networks import Network
from agents.policies.recomputing import recompute_layers
from agents.policies.residual import ResidualPolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.ranges import Count, Positive
from lmgym.rewards.classifier import ClassifierReward

Kind = Literal["auto", "finetune", "lora", Network]


@dataclass(frozen=True)
class PolicyConfig(AgentConfig):
    """What every agent has that learns a policy."""

    policy: Kind = "auto"  # a copy of the reference, an adapter in it, or a residual on its logits
    width: Count = 64  # of a residual network's hidden states
    layers: Count = 2  # of a residual network
    lora_rank: Count = 16  # r of an adapter
    lora_alpha: Positive = 32.0  # of an adapter: alpha / r times B A is added to a weight
    lora_modules: str = ALL_LINEAR  # layers that get an adapter, or names separated by commas
    lora_start: Start = "new"  # reference: the adapter it was loaded with, whose rank, alpha and layers it has then
    gradient_checkpointing: bool = False  # runs layers again in the backward pass: less memory, a third more time
    autocast: Literal["bfloat16"] | None = None  # what updates compute layers in, weights and losses being in float32

    def __post_init__(self) -> None:
        super().__post_init__()
        module_names(self.lora_modules)
        if self.policy == "lora":
            check_peft()


def make_policy(
    envs: RLHFVectorEnv, config: PolicyConfig, seed: int, critic: Critic = "shared"
) -> ActorCritic | ResidualPolicy:
    """The policy that a config asks for, which starts as the reference.

    Args:
        envs: has the reference. config: the kind and its shape. seed: of the weights of a residual or an adapter.
        critic: where the value head sits.

    Raises:
        InvalidArgumentError: for a table to fine-tune or to adapt, layers that cannot be adapted or run again, or a
            critic that a residual does not have.
    """
    policy = _new_policy(envs, config, seed, critic)
    if config.autocast is not None:
        policy = _with_autocast(policy, getattr(torch, config.autocast))
    if config.gradient_checkpointing:
        networks = [policy.network] if isinstance(policy, ResidualPolicy) else [policy.actor, policy.critic]
        for network in networks:
            if network is not None:
                recompute_layers(network)
    return policy


def _new_policy(envs: RLHFVectorEnv, config: PolicyConfig, seed: int, critic: Critic) -> ActorCritic | ResidualPolicy:
    """The policy, before anything is said about how its gradients are taken."""
    lm = envs.engine.lm
    kind = config.policy
    is_table = lm.model.config.model_type == "lmgym_markov"
    if kind in ("finetune", "lora") and is_table:
        learner = "a copy of it" if kind == "finetune" else "an adapter in it"
        raise InvalidArgumentError(
            f"`policy` must be 'auto' or one of {list(get_args(Network))}, got {kind!r}: the reference is a table of "
            f"transition probabilities, in which a state is no more than the last tokens, so that {learner} cannot "
            "learn."
        )
    if kind == "auto":
        kind = "transformer" if is_table else "finetune"
    if kind == "finetune":
        return ActorCritic(lm, critic, _reward_model(envs))
    if kind == "lora":
        return LoRAPolicy(
            lm,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            modules=config.lora_modules,
            seed=seed,
            start=config.lora_start,
            critic=critic,
            reward_model=_reward_model(envs),
        )
    if critic != "shared":
        raise InvalidArgumentError(
            f"`critic` must be 'shared' where the policy is a residual ({kind!r}), got {critic!r}."
        )
    positions = envs.engine.width + envs.engine.horizon
    return ResidualPolicy(lm, kind, width=config.width, layers=config.layers, positions=positions, seed=seed)


def _with_autocast(policy: ActorCritic | ResidualPolicy, dtype: torch.dtype) -> ActorCritic:
    """A policy that computes its layers in another type than float32, that of its weights.

    Raises:
        InvalidArgumentError: for a residual, and for weights that are not in float32.
    """
    if isinstance(policy, ResidualPolicy):
        raise InvalidArgumentError("`autocast` must be null where the policy is a residual, which is in float32.")
    if policy.dtype != torch.float32:
        raise InvalidArgumentError(
            f"`autocast` must be null where `dtype` of the env is not 'float32', got weights in {policy.dtype}."
        )
    policy.autocast = dtype
    return policy


def _reward_model(envs: RLHFVectorEnv) -> torch.nn.Module | None:
    """The reward model, where it reads the policy's own tokens; None where there is none to copy."""
    reward = envs.engine.reward
    if isinstance(reward, ClassifierReward) and reward.reads_ids:
        return reward.model
    return None
