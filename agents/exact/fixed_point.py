"""Where a loss ends: its exact expected update, iterated on a table of all states until nothing moves.

Shapes: X prompts, S states, A legal tokens, N_t prefixes of t tokens of one prompt.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from agents.exact.table import TablePolicy
from agents.exact.updates import expect, expected_update, policy_logits
from agents.on_policy import OnPolicyAgent
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.anatomy import critic_targets, visits
from lmgym.optimum.tree import EpisodeLogits, Tree

MAX_MOVE = 0.5  # nats that a logit moves in a step, at most
TOLERANCE = 1e-8
_GONE = -200.0  # nats: an action so unlikely is gone, and a loss that still pulls at it has no end
_STILL = 1e-3  # of the natural gradient, in units of its first norm: below it every action is at rest


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """A policy that a loss does not move any more, and what it is worth.

    Attributes:
        log_probs: (X, N_t, A) of each level.
        converged: whether the norm has come below the tolerance; if not, the rest is of the last step. A loss that
            drives an action's probability to 0 and pulls ever harder never converges.
        inside: whether every action of every state is at rest. If not, the loss goes on to take probability from some
            actions for ever, and the limit is a policy that never takes them.
        steps: taken. norm: of the expected update in the metric of the policy's own KL.
        value: J. optimum: V*. kl: KL(pi || pi_ref), nats an episode. score: expected.
        to_optimum: KL(pi || pi*), nats an episode at gamma = 1. entropy: nats an episode.
    """

    log_probs: list[Tensor]
    converged: bool
    inside: bool
    steps: int
    norm: float
    value: float
    optimum: float
    kl: float
    to_optimum: float
    score: float
    entropy: float

    @property
    def gap(self) -> float:
        """V* - J."""
        return self.optimum - self.value

    def as_dict(self) -> dict[str, Any]:
        """Its numbers, as JSON values, without the policy; and the gap."""
        numbers = {name: value for name, value in asdict(self).items() if name != "log_probs"}
        return numbers | {"gap": self.gap}


def find_fixed_point(
    agent: OnPolicyAgent,
    tree: Tree,
    *,
    rate: float | None = None,
    steps: Literal["natural", "plain"] = "natural",
    staleness: int = 0,
    behaviour: EpisodeLogits | None = None,
    tolerance: float = TOLERANCE,
    max_steps: int = 5000,
) -> FixedPoint:
    """Iterates the exact expected update of an agent's loss from its policy on. A critic is exact: V^pi at each step.

    Args:
        agent: of `make_table_agent`; its policy ends at the fixed point.
        tree: all responses.
        rate: of the steps, at first, or throughout with stale samples; None is half of 1 / `kl_coef`, at which natural
            steps along the gradient of J halve the distance.
        steps: natural ones divide the update of an action by how often it is taken. They end where plain ones end, in
            fewer steps.
        staleness: how many updates ago the policy was that samples.
        behaviour: what samples instead, fixed.
        tolerance: of the norm. max_steps: after which it gives up.
    """
    policy = agent.policy
    if not isinstance(policy, TablePolicy):
        raise InvalidArgumentError(f"`agent` must be of `make_table_agent`, got one with a {type(policy).__name__}.")
    if rate is None:
        rate = 0.5 / tree.task.kl_coef
    tables = deque([policy.logits.detach().clone()], staleness + 1)
    rates = torch.full_like(tables[0], rate)
    previous = torch.zeros_like(tables[0])
    first = 0.0
    for step in range(max_steps + 1):
        if agent.uses_critic:
            policy.set_critic(critic_targets(tree, policy.log_probs()))
        sampled = behaviour
        if sampled is None and staleness:
            sampled = partial(policy.logits_of, tables[0])
        find = expect if step else expected_update  # which checks the agent
        update = find(agent, tree, sampled).view_as(policy.logits)
        direction, norm = _natural(policy, tree, update)
        first = max(first, norm)
        if norm < tolerance or step == max_steps or policy.logits.min() < _GONE:
            break
        if not staleness:  # each logit goes on faster while it goes on, and slower where it turns (Jacobs 1988)
            rates = rates * torch.where(direction * previous < 0, 0.5, 1.2)
        previous = direction
        moved = rates * (direction if steps == "natural" else update)
        with torch.no_grad():
            policy.logits.copy_((policy.logits + moved.clamp(-MAX_MOVE, MAX_MOVE)).log_softmax(-1))
        tables.append(policy.logits.detach().clone())
    inside = direction.abs().max().item() < _STILL * max(first, 1e-300) or norm == 0
    return _describe(policy, tree, agent, norm < tolerance, inside, step, norm)


def _natural(policy: TablePolicy, tree: Tree, update: Tensor) -> tuple[Tensor, float]:
    """The natural gradient (S, A) of an update (S, A), and its norm: root of their product.

    The Fisher matrix of a state that is visited with probability d is d (diag(p) - p p^T).
    """
    log_probs = policy.log_probs()
    reach = torch.cat([level.flatten() for level in visits(tree.responses, log_probs)]) / len(tree.prompts)
    probs = policy.logits.detach().softmax(-1)
    mass = (reach.unsqueeze(1) * probs).clamp(min=torch.finfo(probs.dtype).tiny)
    direction = update / mass
    direction = direction - (probs * direction).sum(1, keepdim=True)
    return direction, math.sqrt((update * direction).sum().clamp(min=0).item())


def _describe(
    policy: TablePolicy, tree: Tree, agent: OnPolicyAgent, converged: bool, inside: bool, steps: int, norm: float
) -> FixedPoint:
    worth = tree.evaluate(policy_logits(agent))
    optimum = tree.solve_levels()
    best = tree.responses.add_up(optimum.log_probs).flatten()
    possible = worth.log_probs > -torch.inf
    ratio = torch.where(possible, worth.log_probs - best, 0.0)
    return FixedPoint(
        log_probs=policy.log_probs(),
        converged=converged,
        inside=inside,
        steps=steps,
        norm=norm,
        value=worth.value,
        optimum=optimum.values[0].mean().item(),
        kl=worth.metrics["kl"],
        to_optimum=(worth.log_probs.exp() * ratio).sum().item() / len(tree.prompts),
        score=worth.metrics["score"],
        entropy=worth.metrics["entropy"],
    )
