"""Bias and variance of policy gradients in closed form, against the losses of agents and against plain loops."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.exact import TableEstimators, TablePolicy, exact_gradient, make_table_agent, measure_updates
from agents.on_policy import OnPolicyAgent
from agents.questions.tasks import make_random_tree, make_uneven_tree
from lmgym.optimum.anatomy import soft_values
from lmgym.optimum.tree import Tree


def moved(agent: OnPolicyAgent) -> tuple[TablePolicy, list[Tensor]]:
    """An agent's policy away from its start, and a critic that is wrong."""
    policy = agent.policy
    assert isinstance(policy, TablePolicy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        policy.logits += 0.5 * torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64)
        policy.critic += torch.randn(policy.critic.shape, generator=generator, dtype=torch.float64)
    return policy, [level.detach() for level in policy.split(policy.critic)]


def test_whole_returns_less_a_critic_are_those_of_reinforce() -> None:
    tree = make_random_tree(3, horizon=3, kl_coef=0.2)
    agent = make_table_agent(REINFORCE, tree, batch_size=1, baseline="value")
    policy, critic = moved(agent)
    found = TableEstimators(tree, policy.log_probs())
    expected = measure_updates(agent, tree)
    assert torch.allclose(found.gradient.flatten(), exact_gradient(agent, tree), rtol=0, atol=1e-9)
    quality = found.measure(found.gae(critic, 1.0))
    assert quality.bias < 1e-9
    assert quality.variance == pytest.approx(expected.variance, rel=1e-6)
    assert found.measure(found.gae(critic, 0.5)).bias > 0.1


def test_a_group_is_that_of_rloo() -> None:
    size = 3
    tree = make_uneven_tree(3, horizon=2, kl_coef=0.2, token_by_token=False)
    agent = make_table_agent(RLOO, tree, batch_size=size, group_size=size)
    policy, _ = moved(agent)
    found = TableEstimators(tree, policy.log_probs()).measure_group(size)
    assert found.bias < 1e-9
    assert found.variance == pytest.approx(size * measure_updates(agent, tree).variance, rel=1e-6)


def test_a_batch_mean_is_a_constant_critic() -> None:
    tree = make_random_tree(3, horizon=3, kl_coef=0.2)
    policy, _ = moved(make_table_agent(REINFORCE, tree, batch_size=1))
    found = TableEstimators(tree, policy.log_probs())
    variances = []
    quality = found.measure_batch_mean()
    for constant in (-0.5, 0.0, 0.5):
        critic = [torch.full(level.shape[:2], constant, dtype=torch.float64) for level in policy.log_probs()]
        variances.append(found.measure(found.gae(critic, 1.0)).variance)
    assert quality.bias < 1e-9
    assert quality.variance < max(variances)


def test_rollouts_are_those_of_a_loop_over_all_of_them() -> None:
    tree = make_random_tree(3, horizon=2, kl_coef=0.2)
    policy, _ = moved(make_table_agent(REINFORCE, tree, batch_size=1))
    log_probs = policy.log_probs()
    found = TableEstimators(tree, log_probs)
    expected, steps = loop_over_rollouts(tree, log_probs)
    quality = found.measure_rollouts(1)
    assert quality.bias < 1e-9
    assert quality.variance == pytest.approx(expected / found.gradient.square().sum().item(), rel=1e-6)
    assert found.rollout_steps(1) == pytest.approx(steps)
    exact = found.measure(found.gae(soft_values(tree, log_probs).values, 0.0)).variance
    assert quality.variance - exact == pytest.approx(4 * (found.measure_rollouts(4).variance - exact), rel=1e-9)


def loop_over_rollouts(tree: Tree, log_probs: list[Tensor]) -> tuple[float, float]:
    """The trace of the covariance of one response's estimate, and its tokens with those of its rollouts."""
    beta = tree.task.kl_coef
    ends = tree.scores  # (X, 7): the end at once, then a child's three answers after another's
    starts = [row.view(-1) for row in log_probs[0].flatten(0, 1)]
    ending = tree.responses.levels[0].ending
    going = tree.responses.levels[0].going
    square = 0.0
    mean = torch.zeros_like(policy_table(log_probs))
    steps = 0.0
    for x, first in enumerate(starts):
        reward = -beta * (first - tree.reference[0][x, 0])  # (A,) the KL of the first token
        second = log_probs[1][x]  # (N_1, A)
        answers = ends[x, 1:].view(len(going), -1) - beta * (second - tree.reference[1][x])
        outcomes = [(first[i].exp().item(), i, None, (reward[i] + ends[x, k]).item(), 1) for k, i in enumerate(ending)]
        for k, i in enumerate(going):
            for a in range(second.shape[1]):
                p = (first[i] + second[k, a]).exp().item()
                outcomes.append((p, i, (k, a), (reward[i] + answers[k, a]).item(), 2))
        for (p, i, more, total, n), (q, _, _, root, m) in product(outcomes, outcomes):
            at_root = total - root
            if more is None:
                parts = [(p * q, at_root, None)]
                steps += p * q * (n + m) / len(starts)
            else:
                k, a = more
                parts = []
                for b in range(second.shape[1]):
                    after = answers[k, b].item()
                    weight = p * q * second[k, b].exp().item()
                    parts.append((weight, reward[i].item() + after - root, answers[k, a].item() - after))
                    steps += weight * (n + m + 1) / len(starts)
            for weight, here, there in parts:
                estimate = torch.zeros_like(mean)
                estimate[x] = here * (one_hot(i, len(first)) - first.exp())
                if there is not None:
                    k, a = more
                    state = len(starts) + x * len(going) + k
                    estimate[state] = there * (one_hot(a, len(first)) - second[k].exp())
                square += weight * estimate.square().sum().item() / len(starts)
                mean += weight * estimate / len(starts)
    return square - mean.square().sum().item(), steps


def policy_table(log_probs: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten(0, 1) for level in log_probs])


def one_hot(index: int, count: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64)[index]
