"""Has several processes train one agent, where its batches can be shared."""

from __future__ import annotations

from agents.agent import Agent
from agents.distributed import Processes
from agents.on_policy import OnPolicyAgent
from lmgym.errors import InvalidArgumentError


def share(agent: Agent, processes: Processes) -> None:
    """Shares every batch of an agent with other processes, whose agents are made and loaded like it.

    Raises:
        InvalidArgumentError: for an agent whose batches cannot be shared.
    """
    if not isinstance(agent, OnPolicyAgent):
        raise InvalidArgumentError(
            "`agent` must learn from its own episodes in the loop of lmgym where several processes train it, got "
            f"{agent.name}."
        )
    config = agent.config
    smallest = config.batch_size // config.minibatches
    if smallest < processes.count:
        raise InvalidArgumentError(
            f"`agent.minibatches` must leave every process an episode: {config.batch_size} in {config.minibatches} are "
            f"{smallest} each, for {processes.count} processes."
        )
    if config.collect != "episodes":
        raise InvalidArgumentError("`agent.collect` must be 'episodes' where several processes train an agent.")
    if getattr(config, "ptx_coef", 0) != 0:
        raise InvalidArgumentError("`agent.ptx_coef` must be 0 where several processes train an agent.")
    if hasattr(agent.envs.engine.reward, "get_state"):
        raise InvalidArgumentError(
            "`env.reward` must score a response by itself where several processes train an agent, and this one's noise "
            "comes in the order of the calls."
        )
    agent.processes = processes
