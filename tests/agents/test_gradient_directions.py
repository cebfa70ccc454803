"""The update of each algorithm, in expectation over all responses, against the exact gradient of its objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyProblem
from directions import (
    DISCOUNT,
    UNBIASED,
    agent_of,
    alone,
    cosine,
    direction,
    drawn,
    gradient,
    logits_of,
    pairs,
    parameters_of,
    probabilities,
    ways_of,
)

from agents.algorithms.a2c import A2C
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.on_policy import OnPolicyAgent
from lmgym.optimum.tree import Tree
from lmgym.tasks.base import Task


@pytest.fixture(scope="module")
def task() -> Task:
    """Three prompts with 156 responses each; the score rides on every token, its position and the end."""
    return TinyProblem().task


@pytest.fixture(scope="module")
def tree(task: Task) -> Tree:
    return Tree.of(task, "train")


def test_the_policy_is_away_from_the_reference(task: Task, tree: Tree) -> None:
    agent = agent_of(REINFORCE, task)
    assert 0.3 < tree.evaluate(lambda episodes: logits_of(agent, episodes)).kl.mean().item() < 1.0
    for ways in (alone(agent, tree), pairs(agent, tree)):
        assert ways.weights.sum().item() == pytest.approx(1, abs=1e-6)


# -- the gradient of J -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config"), UNBIASED, ids=str)
def test_the_expected_update_is_along_the_gradient_of_j(
    task: Task, tree: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    agent = agent_of(kind, task, **config)
    if config.get("baseline") == "moving_average":
        agent.average = 0.7
    found = direction(agent, tree, ways_of(agent, tree))
    right = gradient(agent, tree)
    assert cosine(found, right) > 1 - 1e-5
    tokens = probabilities(agent, tree).flatten() @ tree.episodes.lengths.double() / len(tree.prompts)
    a_mean_of = tokens.item() if kind in (A2C, PPO) else 1.0  # over tokens; J is one over episodes
    assert found.norm().item() * a_mean_of == pytest.approx(right.norm().item(), rel=1e-3)
    # Both halves of the KL are in it: without, it would be another direction.
    free = Tree.of(replace(task, kl_coef=0.0), "train")
    assert cosine(gradient(agent, free), right) < 0.95


def test_a_baseline_of_the_other_episodes_leaves_the_gradient_of_j(task: Task, tree: Tree) -> None:
    agent = agent_of(REINFORCE, task, baseline="mean")
    found = direction(agent, tree, drawn(agent, tree, 200_000))
    right = gradient(agent, tree)
    assert cosine(found, right) > 0.99
    assert found.norm().item() == pytest.approx(right.norm().item(), rel=0.05)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5])
def test_a_lambda_below_one_trusts_the_critic_and_is_biased_by_it(task: Task, tree: Tree, gae_lambda: float) -> None:
    agent = agent_of(A2C, task, gae_lambda=gae_lambda, vf_coef=0.0)
    assert cosine(direction(agent, tree, alone(agent, tree)), gradient(agent, tree)) < 0.99


@pytest.mark.parametrize("kind", [REINFORCE, A2C, PPO])
def test_a_small_step_raises_j(task: Task, tree: Tree, kind: type[OnPolicyAgent]) -> None:
    agent = agent_of(kind, task, **({"whiten_advantages": "none"} if kind is PPO else {}))
    step = 1e-2 * direction(agent, tree, alone(agent, tree))
    before = tree.evaluate(lambda episodes: logits_of(agent, episodes)).value
    with torch.no_grad():
        parameters = parameters_of(agent)
        for parameter, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            parameter += part.view_as(parameter)
    assert tree.evaluate(lambda episodes: logits_of(agent, episodes)).value > before


# -- a discount ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def discounted() -> Tree:
    return Tree.of(replace(TinyProblem().task, gamma=DISCOUNT), "train")


@pytest.mark.parametrize(
    ("kind", "config"),
    [pair for pair in UNBIASED if pair[0] in (REINFORCE, RLOO)],
    ids=str,
)
def test_at_a_discount_reinforce_and_rloo_follow_the_gradient_of_j(
    discounted: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    agent = agent_of(kind, discounted.task, **config)
    found = direction(agent, discounted, ways_of(agent, discounted))
    assert cosine(found, gradient(agent, discounted)) > 1 - 1e-5


@pytest.mark.parametrize(("kind", "config"), [pair for pair in UNBIASED if pair[0] in (A2C, PPO)], ids=str)
def test_at_a_discount_a2c_and_ppo_count_late_tokens_too_much(
    discounted: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    """They leave gamma^t out, as is usual: along the states visited, not along the discounted ones."""
    agent = agent_of(kind, discounted.task, **config)
    assert cosine(direction(agent, discounted, alone(agent, discounted)), gradient(agent, discounted)) < 0.97
