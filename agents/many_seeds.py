"""Many seeds at once: agents that differ in their seed alone train in one process, in one batched forward and backward.

Each is an agent of its own: it has its own prompts, random numbers, minibatches, optimiser and metrics, and comes to
what it would have come to alone, but for rounding. Only the weights are stacked while they train. The algorithms are
untouched: the loss of each seed is its algorithm's own, and depends on its own weights, so that the gradient of the
sum of all losses holds the gradient of each.

Shapes: S seeds, B episodes of a seed's batch, b of its minibatch, n tokens, N numbers that a seed's weights have.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.agent import Callback
from agents.algorithms.grpo import GRPO
from agents.algorithms.ppo import PPO
from agents.batch import Batch
from agents.diagnostics import check_ratio
from agents.finite import check_step, check_weights
from agents.on_policy import OnPolicyAgent, measure_critic
from agents.stack import Metrics, Stack
from agents.update import average_steps, minibatch_rows
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, NotFiniteError

# What is done for all agents together, so that an algorithm's own way of doing it would be passed over. What two
# algorithms write there does nothing more under the config below.
_LOOP = ("collect", "losses", "new_policy", "read", "update")
_HARMLESS = (PPO.losses, GRPO.read)
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "policy": ("auto", "finetune", "transformer"),
    "critic": ("shared",),
    "collect": ("episodes",),
    "recompute_log_probs": (False,),
    "gradient_checkpointing": (False,),
    "offload": (False,),
    "adam": ("pytorch", "tensorflow"),
    "autocast": (None,),
    "whiten_advantages": ("batch", "none"),
    "ptx_coef": (0.0,),
    "kl_estimator": ("k1", "k2", "k3"),
}


def check_agent(agent_class: type, config: Any) -> None:
    """Raises where agents of a class and a config cannot be trained at once; what depends on the model is seen later.

    Raises:
        InvalidArgumentError: with what is in the way.
    """
    if not issubclass(agent_class, OnPolicyAgent):
        raise _refusal("`agent`", "one that learns from its own episodes, such as 'ppo'", agent_class.__name__)
    for name in _LOOP:
        own = getattr(agent_class, name)
        if own is not getattr(OnPolicyAgent, name) and own not in _HARMLESS:
            raise _refusal("`agent`", f"one without a `{name}` of its own", agent_class.__name__)
    for name, expected in _EXPECTED.items():
        got = getattr(config, name, expected[0])
        if got not in expected:
            wanted = " or ".join(map(repr, expected))
            raise _refusal(f"`agent.{name}`", wanted, repr(got))


def _refusal(name: str, expected: str, got: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} must be {expected} where `seeds` is above 1, got {got}. Or: -m seed=0,1,2.")


class ManySeeds:
    """Trains S agents at once, each to the same budget.

    Args:
        agents: S of one class and one config, with seeds of their own, in envs of their own.

    Attributes:
        failures: what has ended the training of an agent before its time; the others have gone on without it.

    Raises:
        InvalidArgumentError: for policies whose weights cannot be stacked.
    """

    def __init__(self, agents: Sequence[OnPolicyAgent]) -> None:
        self.agents = list(agents)
        self.failures: dict[OnPolicyAgent, NotFiniteError] = {}
        self._stack = Stack(self.agents)

    def learn(self, total_timesteps: int, callbacks: Mapping[OnPolicyAgent, Callback]) -> None:
        """Trains until each agent has taken `total_timesteps` env steps, or has failed.

        Args:
            total_timesteps: of each agent's whole run, steps before a resume included.
            callbacks: of each agent, as `OnPolicyAgent.learn` takes them; training of all stops once one returns False.
        """
        self._stack = Stack(self.agents)  # an agent may have been loaded since
        while running := self._unfinished(total_timesteps):
            rows = self._learn_batch(running, total_timesteps)
            answers = [callbacks[agent](agent.num_timesteps, metrics) for agent, metrics in rows.items()]
            if False in answers:
                return

    def _unfinished(self, total_timesteps: int) -> list[OnPolicyAgent]:
        return [x for x in self.agents if x.num_timesteps < total_timesteps and x not in self.failures]

    def _stack_of(self, agents: Sequence[OnPolicyAgent]) -> Stack:
        """The stack of some agents; the one before, where it is of others, is copied back."""
        if self._stack.agents != agents:
            self._stack.copy_back()
            self._stack = Stack(agents)
        return self._stack

    def _learn_batch(self, agents: list[OnPolicyAgent], total_timesteps: int) -> dict[OnPolicyAgent, Metrics]:
        """A batch of each of some agents (`OnPolicyAgent.learn`); the metrics of those that have not failed."""
        started = time.perf_counter()
        stack = self._stack_of(agents)
        for agent in agents:
            agent.note_state()
        episodes = stack.collect()
        collected = time.perf_counter()
        shares = [agent.num_timesteps / total_timesteps for agent in agents]
        for agent, share, batch in zip(agents, shares, episodes, strict=True):
            agent.updater.set_lr(share, (agent.num_timesteps + batch.num_tokens) / total_timesteps)
        rows = dict(zip(agents, stack.describe(episodes), strict=True))
        with contextlib.ExitStack() as changing:
            for agent in agents:
                changing.enter_context(agent.changing_weights())
            batches = dict(zip(agents, map(_shape, agents, episodes, shares), strict=True))
            for agent, metrics in self._learn_from(batches).items():
                rows[agent] |= metrics
                agent.num_timesteps += batches[agent].episodes.num_tokens
                agent.kl.update(rows[agent].get("rollout/kl", 0.0), len(batches[agent]))
        ended = time.perf_counter()
        for agent, metrics in rows.items():
            agent.at_rest = agent not in self.failures
            metrics["time/tokens_per_second"] = batches[agent].episodes.num_tokens / (ended - started)
            metrics["time/collect_seconds"] = collected - started
            metrics["time/update_seconds"] = ended - collected
            metrics |= agent.tokens.metrics()
        return {agent: metrics for agent, metrics in rows.items() if agent.at_rest}

    def _learn_from(self, batches: Mapping[OnPolicyAgent, Batch]) -> dict[OnPolicyAgent, Metrics]:
        """Updates on the agents' batches and checks what came of it (`OnPolicyAgent.learn_from`).

        Returns:
            The metrics of the update, of the agents that have not failed.
        """
        histories = self._update(batches)
        self._stack.copy_back()
        metrics: dict[OnPolicyAgent, Metrics] = {}
        for agent, batch in batches.items():
            with self._failing(agent):
                check_weights(agent.policy, agent.config)
            if agent not in self.failures:
                metrics[agent] = average_steps(histories[agent])
                check_ratio(metrics[agent]["train/ratio_error"], agent.policy.dtype)
                metrics[agent] |= measure_critic(agent, batch)
        return metrics

    def _update(self, batches: Mapping[OnPolicyAgent, Batch]) -> dict[OnPolicyAgent, list[Metrics]]:
        """Passes of optimiser steps over the agents' batches (`OnPolicyAgent.update`); the metrics of the steps."""
        agents = list(batches)
        config = agents[0].config
        whole = _concatenate(list(batches.values()), self._stack.policy.device)
        starts = {agent: seed * config.batch_size for seed, agent in enumerate(agents)}
        orders = {agent: _draw_orders(agent) for agent in agents}
        sizes = {agent: _count_tokens(batch.episodes) for agent, batch in batches.items()}
        histories: dict[OnPolicyAgent, list[Metrics]] = {agent: [] for agent in agents}
        for _ in range(config.epochs * config.minibatches):
            chosen = {agent: next(orders[agent]) for agent in agents}
            for agent, rows in chosen.items():
                size = int(sizes[agent][rows].sum())
                agent.tokens.forward += size
                agent.tokens.backward += size
            minibatch = _sort_rows(whole, torch.stack([starts[agent] + rows for agent, rows in chosen.items()]))
            steps = self._stack_of(agents).step(minibatch)
            for number, (agent, metrics) in enumerate(zip(agents, steps, strict=True)):
                histories[agent].append(metrics)
                with self._failing(agent):
                    check_step(metrics, agent.policy, agent.config, _inputs(minibatch, number, len(agents)))
            agents = [x for x in agents if x not in self.failures and not x.stop_early(histories[x][-1])]
            if not agents:
                break
        return histories

    @contextlib.contextmanager
    def _failing(self, agent: OnPolicyAgent) -> Iterator[None]:
        """Where training of an agent diverges in the block, that is noted, and the other agents go on."""
        try:
            yield
        except NotFiniteError as error:
            self.failures.setdefault(agent, error)


def _shape(agent: OnPolicyAgent, episodes: Episodes, share: float) -> Batch:
    """An agent's episodes with their advantages: on the CPU, unless the critic is asked about a state once more."""
    if not bool(episodes.terminated.all()):
        episodes = episodes.to(agent.policy.device)
    return agent.shape(episodes, share)


def _draw_orders(agent: OnPolicyAgent) -> Iterator[Tensor]:
    """The rows of an agent's minibatches, step by step."""
    config = agent.config
    return minibatch_rows(config.batch_size, config.epochs, config.minibatches, agent.generator)


def _count_tokens(episodes: Episodes) -> Tensor:
    """(B,) tokens of each episode and its prompt, on the CPU."""
    return (episodes.prompt_mask.sum(1) + episodes.lengths).cpu()


def _concatenate(batches: Sequence[Batch], device: torch.device) -> Batch:
    """The batches of all agents, one after the other, on a device."""
    return replace(
        batches[0],
        episodes=Episodes.concatenate([batch.episodes for batch in batches]).to(device),
        advantages=torch.cat([batch.advantages for batch in batches]).to(device),
        returns=torch.cat([batch.returns for batch in batches]).to(device),
    )


def _sort_rows(whole: Batch, rows: Tensor) -> Batch:
    """The episodes of rows (S, b) on the CPU, short ones first among those of an agent."""
    rows = rows.to(whole.advantages.device)
    order = whole.episodes.lengths[rows].argsort(dim=1)
    return whole[rows.gather(1, order).flatten()]


def _inputs(minibatch: Batch, number: int, agents: int) -> dict[str, Tensor]:
    """What the loss of one of the agents is computed from."""
    count = len(minibatch) // agents
    rows = slice(number * count, (number + 1) * count)
    episodes = minibatch.episodes
    assert episodes.values is not None
    inputs = {"scores": episodes.scores, "values": episodes.values}
    inputs |= {"advantages": minibatch.advantages, "returns": minibatch.returns}
    return {name: x[rows] for name, x in inputs.items()}
