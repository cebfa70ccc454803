"""Where an algorithm's update points, in expectation over all responses of a small problem.

Nothing is sampled unless its name says so: a response counts with its probability, a group of two with the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from agents.algorithms.a2c import A2C
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.batch import Batch
from agents.on_policy import OnPolicyAgent
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.optimum.tree import Tree
from lmgym.tasks.base import Task

DISCOUNT = 0.3
UNBIASED = [  # their expected update is along the gradient of J
    (REINFORCE, {"baseline": "none"}),
    (REINFORCE, {"baseline": "moving_average"}),
    (REINFORCE, {"baseline": "value", "vf_coef": 0.0}),
    (A2C, {"gae_lambda": 1.0, "vf_coef": 0.0}),
    (PPO, {"gae_lambda": 1.0, "vf_coef": 0.0, "whiten_advantages": "none"}),
    (RLOO, {"group_size": 2}),
]


def agent_of(kind: type[OnPolicyAgent], task: Task, **config: Any) -> OnPolicyAgent:
    """An agent whose residual, and critic, have been moved away from the reference, the same for every kind."""
    made = kind.Config(**{"batch_size": 8, "epochs": 1, "minibatches": 1, "policy": "mlp", "width": 16} | config)
    envs = RLHFVectorEnv(made.num_envs, group_size=made.responses, autoreset_mode="SameStep", task=task, device="cpu")
    agent = kind(envs, made)
    agent.policy.load_state_dict(agent.new_policy(0).state_dict())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += 0.17 * torch.randn(parameter.shape, generator=generator)
    return agent


@dataclass(frozen=True)
class Ways:
    """What may happen, and how likely: the rows (B,) of a tree's episodes in a batch, and the weight (B,) of each."""

    rows: Tensor
    weights: Tensor


def logits_of(agent: OnPolicyAgent, episodes: Episodes) -> Tensor:
    return agent.policy.read(episodes).logits


def probabilities(agent: OnPolicyAgent, tree: Tree) -> Tensor:
    """(X, R / X) of the responses of each prompt."""
    return tree.evaluate(lambda episodes: logits_of(agent, episodes)).log_probs.exp().view(tree.scores.shape)


def alone(agent: OnPolicyAgent, tree: Tree) -> Ways:
    """Every response, by itself."""
    probs = probabilities(agent, tree)
    return Ways(torch.arange(probs.numel()), probs.flatten() / len(probs))


def pairs(agent: OnPolicyAgent, tree: Tree) -> Ways:
    """Every group of two responses to one prompt, one after the other; each of the two counts half."""
    probs = probabilities(agent, tree)
    x, n = probs.shape
    first, second = torch.cartesian_prod(torch.arange(n), torch.arange(n)).unbind(1)
    starts = n * torch.arange(x).unsqueeze(1)
    rows = torch.stack([starts + first, starts + second], -1).flatten()
    return Ways(rows, (probs[:, first] * probs[:, second] / (2 * x)).repeat_interleave(2))


def drawn(agent: OnPolicyAgent, tree: Tree, count: int) -> Ways:
    """A sampled batch."""
    every = alone(agent, tree)
    rows = torch.multinomial(every.weights, count, True, generator=torch.Generator().manual_seed(0))
    return Ways(rows, torch.full((count,), 1 / count, dtype=torch.float64))


def as_collected(agent: OnPolicyAgent, episodes: Episodes) -> Episodes:
    """Episodes with the log-probs and values that collecting them with the agent's policy would have recorded."""
    mask = episodes.response_mask
    with torch.no_grad():
        read = agent.policy.read(episodes)
    chosen = read.logits.log_softmax(-1).gather(1, episodes.response_ids[mask].unsqueeze(1)).squeeze(1)
    log_probs, values = (chosen.new_zeros(mask.shape).masked_scatter(mask, x) for x in (chosen, read.values))
    return replace(episodes, log_probs=log_probs, values=values)


def flat(tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """(p,) float64, 0 for what is None."""
    pairs_ = zip(tensors, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if x is None else x).flatten() for x, p in pairs_]).double()


def parameters_of(agent: OnPolicyAgent) -> list[Tensor]:
    return [p for p in agent.policy.parameters() if p.requires_grad]


def direction(agent: OnPolicyAgent, tree: Tree, ways: Ways, *, scored: bool = True) -> Tensor:
    """(p,) what the agent goes along, -E grad loss, in expectation over the ways a batch may come out.

    A loss at ratio 1 is linear in its weights and its advantages, and so a response needs to be read once, with its
    advantages averaged over the ways it came about.

    Args:
        agent: whose `rewards`, `advantages` and `loss` are asked.
        tree: of the same task.
        ways: how a batch may come out.
        scored: False takes 0 for every advantage, which leaves a KL in the loss.
    """
    every = as_collected(agent, tree.episodes)
    batch = every[ways.rows]
    advantages, _ = agent.advantages(batch, agent.rewards(batch))
    count = len(every)
    weight = torch.zeros(len(every), dtype=torch.float64).index_add_(0, ways.rows, ways.weights)
    summed = torch.zeros((count, advantages.shape[1]), dtype=torch.float64)
    summed.index_add_(0, ways.rows, ways.weights.unsqueeze(1) * advantages.double())
    mean = (summed / weight.clamp(min=1e-300).unsqueeze(1) * scored).float()
    read = agent.read(Batch(every, mean, torch.zeros_like(mean)), torch.tensor(count), count)
    a_token = weight.unsqueeze(1).expand_as(every.response_mask)[every.response_mask].float()
    tokens = weight @ every.lengths.double()  # of an episode, on average
    loss, _ = agent.loss(replace(read, weights=a_token / tokens, episode_weights=a_token))
    found = torch.autograd.grad(-loss, parameters_of(agent), allow_unused=True)
    return flat(found, parameters_of(agent))


def gradient(agent: OnPolicyAgent, tree: Tree) -> Tensor:
    """(p,) of J, exact."""
    parameters = parameters_of(agent)
    _, found = tree.gradient(lambda episodes: logits_of(agent, episodes), parameters)
    return flat(found, parameters)


def cosine(a: Tensor, b: Tensor) -> float:
    return cosine_similarity(a, b, dim=0).item()


def ways_of(agent: OnPolicyAgent, tree: Tree) -> Ways:
    return pairs(agent, tree) if agent.config.responses == 2 else alone(agent, tree)


def late_term(agent: OnPolicyAgent, tree: Tree) -> Tensor:
    """(p,) float64 of -kl_coef E [gamma^(n-1) sum_t grad log pi(a_t|s_t)], what a KL paid late has for a derivative."""
    episodes = tree.episodes
    task = tree.task
    mask = episodes.response_mask
    weights = alone(agent, tree).weights * task.gamma ** (episodes.lengths - 1)
    log_pi = agent.policy.read(episodes).logits.log_softmax(-1)
    chosen = log_pi.gather(1, episodes.response_ids[mask].unsqueeze(1)).squeeze(1)
    total = -task.kl_coef * (weights.unsqueeze(1).expand_as(mask)[mask] * chosen).sum()
    found = torch.autograd.grad(total, parameters_of(agent), materialize_grads=True)
    return torch.cat([x.flatten() for x in found]).double()
