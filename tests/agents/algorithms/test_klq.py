"""KLQ's first step on a batch: that of A2C, times the price of a nat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TinyProblem
from test_gradient_directions import (
    DISCOUNT,
    agent_of,
    cosine,
    flat,
    gradient,
    parameters_of,
    q_gradient,
    tabular_ways,
)
from torch import Tensor

from agents.algorithms.a2c import A2C
from agents.algorithms.klq import KLQ
from lmgym.optimum.tree import Tree


@pytest.fixture(scope="module", params=[1.0, DISCOUNT])
def tree(request: pytest.FixtureRequest) -> Tree:
    return Tree.of(TinyProblem(gamma=request.param).task, "train")


def policy_part(tree: Tree, td_lambda: float) -> Tensor:
    """(p,) what KLQ's policy goes along, with V held, in expectation over all responses."""
    agent = agent_of(KLQ, tree.task, td_lambda=td_lambda)
    episodes, probs = tabular_ways(agent, tree)
    every, mask = torch.arange(len(episodes)), episodes.response_mask
    targets = agent.advantages(episodes, agent.rewards(episodes))
    batch = agent._read(episodes, *targets, every, torch.tensor(len(episodes)), len(episodes))
    weights = probs.unsqueeze(1).expand_as(mask)[mask]
    loss, _ = agent.loss(replace(batch, values=batch.values.detach(), weights=weights))
    return flat(torch.autograd.grad(-loss, parameters_of(agent), allow_unused=True), parameters_of(agent))


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_first_step_is_kl_coef_times_that_of_a2c(tree: Tree, decay: float) -> None:
    klq = agent_of(KLQ, tree.task, td_lambda=decay)
    a2c = agent_of(A2C, tree.task, gae_lambda=decay, vf_coef=1.0)
    (_, found), (_, other) = q_gradient(klq, tree), q_gradient(a2c, tree)
    torch.testing.assert_close(found, tree.task.kl_coef * other, rtol=0, atol=1e-5 * other.norm().item())
    _, free = q_gradient(agent_of(A2C, tree.task, gae_lambda=decay, vf_coef=0.0), tree)
    assert cosine(free, other) < 0.99  # the critic has a share in it


def test_the_policy_follows_kl_coef_times_the_gradient_of_j(tree: Tree) -> None:
    """At gamma = 1 and lambda = 1, where neither the critic nor a state's discount is in the way."""
    found, right = policy_part(tree, td_lambda=1.0), gradient(agent_of(KLQ, tree.task), tree)
    if tree.task.gamma < 1:
        assert cosine(found, right) < 0.97
    else:
        torch.testing.assert_close(found, tree.task.kl_coef * right, rtol=0, atol=1e-5 * right.norm().item())
    assert cosine(policy_part(tree, td_lambda=0.5), right) < 0.99
