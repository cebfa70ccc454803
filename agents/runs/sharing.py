"""Has several processes train one agent, where its batches can be shared."""

from __future__ import annotations

from agents.agent import Agent, AgentConfig
from agents.distributed import Processes
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.supervised import SupervisedAgent, SupervisedConfig
from lmgym.errors import InvalidArgumentError


def check_shareable(agent_class: type[Agent], config: AgentConfig, count: int) -> None:
    """Raises `InvalidArgumentError` where the batches of an agent cannot be shared; nothing is loaded for it.

    Args:
        agent_class: of the agent. config: its numbers. count: of the processes.
    """
    if count == 1:
        return
    if issubclass(agent_class, SupervisedAgent):
        assert isinstance(config, SupervisedConfig)
        if config.batch_size < count:
            raise InvalidArgumentError(
                f"`agent.batch_size` must leave every process an example: {config.batch_size} for {count} processes."
            )
    elif issubclass(agent_class, OnPolicyAgent):
        assert isinstance(config, OnPolicyConfig)
        _check_on_policy(config, count)
    else:
        raise InvalidArgumentError(
            "`agent` must learn in a loop of lmgym where several processes train it, from its own episodes or from "
            f"examples, got {agent_class.__name__}."
        )


def _check_on_policy(config: OnPolicyConfig, count: int) -> None:
    smallest = config.batch_size // config.minibatches
    if smallest < count:
        raise InvalidArgumentError(
            f"`agent.minibatches` must leave every process an episode: {config.batch_size} in {config.minibatches} are "
            f"{smallest} each, for {count} processes."
        )
    if config.collect != "episodes":
        raise InvalidArgumentError("`agent.collect` must be 'episodes' where several processes train an agent.")
    if getattr(config, "ptx_coef", 0) != 0:
        raise InvalidArgumentError("`agent.ptx_coef` must be 0 where several processes train an agent.")


def share(agent: Agent, processes: Processes) -> None:
    """Shares every batch of an agent with other processes, whose agents are made and loaded like it.

    Raises:
        InvalidArgumentError: for an agent whose batches cannot be shared.
    """
    check_shareable(type(agent), agent.config, processes.count)
    if hasattr(agent.envs.engine.reward, "get_state"):
        raise InvalidArgumentError(
            "`env.reward` must score a response by itself where several processes train an agent, and this one's noise "
            "comes in the order of the calls."
        )
    agent.processes = processes
