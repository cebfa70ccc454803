"""GRPO: its two parts, in expectation over all groups, against the gradients of the score and of the KL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyProblem
from directions import (
    DISCOUNT,
    Ways,
    agent_of,
    alone,
    cosine,
    direction,
    flat,
    gradient,
    logits_of,
    pairs,
    parameters_of,
)
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.on_policy import OnPolicyAgent
from lmgym.kl import exact
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.tasks.base import Task


@pytest.fixture(scope="module")
def task() -> Task:
    """Three prompts with 156 responses each; the score rides on every token, its position and the end."""
    return TinyProblem().task


@pytest.fixture(scope="module")
def tree(task: Task) -> Tree:
    return Tree.of(task, "train")


# -- GRPO: the score -------------------------------------------------------------------------------------------------

DR = {"group_size": 2, "scale_by_std": False, "length_mean": False}


def score_part(tree: Tree, task: Task, **config: Any) -> tuple[Tensor, Tensor]:
    """What GRPO goes along without its KL, and the gradient of the expected score."""
    agent = agent_of(GRPO, task, **{**DR, **config})
    agent.kl.value = 0.0
    free = Tree.of(replace(task, kl_coef=0.0), "train")
    return direction(agent, tree, pairs(agent, tree)), gradient(agent, free)


@pytest.mark.parametrize("gamma", [1.0, DISCOUNT])
def test_dr_grpo_follows_the_gradient_of_the_expected_score(task: Task, tree: Tree, gamma: float) -> None:
    found, right = score_part(tree, replace(task, gamma=gamma))
    assert cosine(found, right) > 1 - 1e-5
    # A group's mean holds the response itself, which takes off 1 / k; the horizon divides.
    assert found.norm().item() == pytest.approx(right.norm().item() / 2 / task.max_new_tokens, rel=1e-3)


@pytest.mark.parametrize("config", [{"scale_by_std": True}, {"length_mean": True}], ids=str)
def test_each_of_what_dr_grpo_removes_turns_the_direction(task: Task, tree: Tree, config: dict[str, Any]) -> None:
    found, right = score_part(tree, task, **config)
    assert 0.5 < cosine(found, right) < 0.995


def test_dividing_by_the_deviation_gives_every_prompt_the_same_weight(task: Task) -> None:
    """Where the scores of one prompt are spread ten times as far as those of the rest, hers lead, or do not."""
    paid = task.reward

    def uneven(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        scores = paid(prompts, completions, **columns)  # type: ignore[operator]
        return [10 * s if p == "x" else s for p, s in zip(prompts, scores, strict=True)]

    spread = replace(task, reward=uneven)
    tree = Tree.of(spread, "train")
    plain, right = score_part(tree, spread)
    scaled, _ = score_part(tree, spread, scale_by_std=True)
    assert cosine(plain, right) > 1 - 1e-5
    assert cosine(scaled, right) < 0.9
    even, _ = score_part(Tree.of(task, "train"), task, scale_by_std=True)
    assert cosine(scaled, even) > 1 - 1e-3  # the scale of a prompt's scores is gone


# -- GRPO: the KL in the loss ----------------------------------------------------------------------------------------


def kl_part(tree: Tree, estimator: str) -> tuple[OnPolicyAgent, Tensor]:
    """What GRPO goes along with no scores and a price of 1 a nat, in nats an episode."""
    agent = agent_of(GRPO, tree.task, kl_estimator=estimator, **DR)
    agent.kl.value = 1.0
    return agent, direction(agent, tree, alone_twice(agent, tree), scored=False) * tree.task.max_new_tokens


def alone_twice(agent: OnPolicyAgent, tree: Tree) -> Ways:
    """Every response beside itself: a group, and half the weight each."""
    every = alone(agent, tree)
    return Ways(every.rows.repeat_interleave(2), every.weights.repeat_interleave(2) / 2)


def state_kl_gradient(agent: OnPolicyAgent, tree: Tree, *, other: bool = False) -> Tensor:
    """(p,) of -E sum_t KL at s_t, by autograd, with the distribution of the states held; `other`: of the other KL."""
    mask = tree.episodes.response_mask
    own = logits_of(agent, tree.episodes).double().log_softmax(-1)
    ref = make_episode_logits(tree.task.reference("cpu"))(tree.episodes).double().log_softmax(-1)
    weights = alone(agent, tree).weights.unsqueeze(1).expand_as(mask)[mask]
    total = -(weights * (exact(ref, own) if other else exact(own, ref))).sum()
    return flat(torch.autograd.grad(total, parameters_of(agent), allow_unused=True), parameters_of(agent))


@pytest.mark.parametrize(("estimator", "other"), [("k2", False), ("exact", False), ("k3", True)])
def test_the_kl_of_grpo_pulls_along_the_kl_of_the_states(tree: Tree, estimator: str, other: bool) -> None:
    """k3 a token: that of the other direction, KL(pi_ref || pi)."""
    agent, found = kl_part(tree, estimator)
    torch.testing.assert_close(found, state_kl_gradient(agent, tree, other=other), rtol=1e-4, atol=1e-6)
    assert cosine(found, state_kl_gradient(agent, tree, other=not other)) < 0.999


def test_k1_in_the_loss_does_not_pull_at_all(tree: Tree) -> None:
    agent, found = kl_part(tree, "k1")
    assert found.norm() < 1e-5 * state_kl_gradient(agent, tree).norm()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_no_kl_of_grpo_is_the_gradient_of_j(task: Task, tree: Tree, estimator: str) -> None:
    """All of them leave out what a token does to the KL of later states (docs/optimum.md)."""
    agent, pull = kl_part(tree, estimator)
    right = gradient(agent, tree)
    score = 2 * task.max_new_tokens * score_part(tree, task)[0]
    bias = (score + task.kl_coef * pull - right).norm() / right.norm()
    assert bias > 0.03


def test_k2_to_go_makes_it_the_gradient_of_j(task: Task, tree: Tree) -> None:
    agent, pull = kl_part(tree, "k2_to_go")
    right = gradient(agent, tree)
    score = 2 * task.max_new_tokens * score_part(tree, task)[0]
    assert (score + task.kl_coef * pull - right).norm() < 1e-3 * right.norm()


def test_the_two_parts_of_grpo_add_up(task: Task, tree: Tree) -> None:
    agent = agent_of(GRPO, task, **DR)
    whole = direction(agent, tree, pairs(agent, tree))
    score = score_part(tree, task)[0]
    _, pull = kl_part(tree, "k3")
    torch.testing.assert_close(whole, score + task.kl_coef * pull / task.max_new_tokens, rtol=1e-3, atol=1e-6)
