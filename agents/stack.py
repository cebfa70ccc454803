"""Agents whose weights are stacked: they collect, read and step together, each with weights of its own.

Shapes: S agents, b episodes of a minibatch, n tokens, N numbers that an agent's weights have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from agents.batch import Batch, Minibatch
from agents.finite import GRAD_NORM
from agents.on_policy import MAX_EXACT_KL_EPISODES, OnPolicyAgent, check_collected
from agents.policies.stacked import StackedPolicy
from agents.stacked_adam import StackedAdam
from agents.stacked_batch import exact_kls, read_side_by_side
from lmgym.episodes import Episodes
from lmgym.kl import FixedKL
from lmgym.rollout import collect_side_by_side

Metrics = dict[str, float]

_CPU_TOKENS = 4096  # of all seeds in one forward: more of them write and read main memory


class Stack:
    """Agents whose weights are stacked, for as long as all of them go on.

    Args:
        agents: S of one class and one config, with seeds of their own.
    """

    def __init__(self, agents: Sequence[OnPolicyAgent]) -> None:
        self.agents = list(agents)
        self.policy = StackedPolicy([agent.policy for agent in agents])
        policies = [agent.policy for agent in agents]
        self.adam = StackedAdam(self.policy, policies, [agent.updater for agent in agents], agents[0].uses_critic)

    def copy_back(self) -> None:
        """Gives the agents their weights, and their optimisers what they know of them."""
        self.policy.copy_back()
        self.adam.copy_back()

    def collect(self) -> list[Episodes]:
        """A batch of each agent, on the CPU, checked."""
        first = self.agents[0]
        batches = collect_side_by_side(
            [agent.envs for agent in self.agents],
            self.policy,
            first.config.batch_size,
            first.sampler,
            [agent.generator for agent in self.agents],
        )
        for agent, episodes in zip(self.agents, batches, strict=True):
            check_collected(agent, episodes)
        return batches

    def describe(self, batches: Sequence[Episodes]) -> list[Metrics]:
        """The metrics of each agent's batch before it is learned from."""
        metrics = [agent.describe(episodes) for agent, episodes in zip(self.agents, batches, strict=True)]
        first = self.agents[0]
        if first.envs.kl_coef == 0:
            return metrics
        few = [episodes[:MAX_EXACT_KL_EPISODES] for episodes in batches]
        for agent, episodes in zip(self.agents, few, strict=True):
            agent.tokens.read(episodes, forward=2)
        read = Episodes.concatenate(few).trimmed().to(self.policy.device)
        kls = exact_kls(self.policy, first.sampler, first.envs.engine.lm, read)
        return [row | {"rollout/exact_kl": kl} for row, kl in zip(metrics, kls, strict=True)]

    def step(self, minibatch: Batch) -> list[Metrics]:
        """One optimiser step of each agent on its b of S * b episodes; the metrics of each (`Updater.step`)."""
        gradients, sums = self._sum_gradients(minibatch)
        sums[GRAD_NORM] = self.adam.clip(gradients).double()
        numbers = torch.stack(list(sums.values())).T.tolist()  # one look at all of them
        self.adam.step(gradients)
        return [dict(zip(sums, row, strict=True)) for row in numbers]

    def _sum_gradients(self, minibatch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(S, N) gradients of the agents' losses, and their metrics (S,), summed over micro-batches."""
        seeds = len(self.agents)
        count = len(minibatch) // seeds
        totals = minibatch.episodes.lengths.view(seeds, count).sum(1)
        rows = torch.arange(len(minibatch), device=totals.device).view(seeds, count)
        gradients = torch.zeros_like(self.policy.weights)
        sums: dict[str, Tensor] = {}
        for part in rows.split(self._part_size(minibatch), dim=1):
            few = minibatch if part.shape[1] == count else minibatch[part.flatten()]
            read = read_side_by_side(self.policy, self.agents[0].sampler, few, totals, count)
            losses, metrics = self._losses(read)
            with torch.no_grad():
                metrics["train/entropy"] = (read.weights * read.entropies).sum(1)
                metrics["train/ratio_error"] = (read.weights * (read.log_probs - read.old_log_probs).abs()).sum(1)
            gradients += torch.autograd.grad(losses.sum(), self.policy.weights)[0]
            for name, values in metrics.items():
                sums[name] = sums.get(name, 0.0) + values.detach().double()
        return gradients, sums

    def _part_size(self, minibatch: Batch) -> int:
        """Episodes of a seed in one forward: what the config says, and on a CPU what stays in the processor's cache."""
        size = self.agents[0].config.micro_batch_size
        if self.policy.device.type != "cpu":
            return size
        length = minibatch.episodes.input_ids.shape[1]
        return min(size, max(1, _CPU_TOKENS // (length * len(self.agents))))

    def _losses(self, read: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(S,) the algorithm's own loss of each agent, and its metrics, of a minibatch of (S, n) tensors."""
        first = self.agents[0]
        own = first.kl
        columns = {field.name: x for field in fields(read) if (x := getattr(read, field.name)) is not None}

        def loss(columns: dict[str, Any], kl_coef: Any) -> tuple[Tensor, dict[str, Tensor]]:
            first.kl = FixedKL(kl_coef)
            return first.loss(Minibatch(**columns))

        prices = torch.tensor([agent.kl.value for agent in self.agents], device=self.policy.device)
        try:
            losses, metrics = torch.vmap(loss)(columns, prices)
        finally:
            first.kl = own
        return losses, metrics
