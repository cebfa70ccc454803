"""Agents that compare responses in groups: their expected updates by enumeration, their zeros, and DAPO's sampling."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyProblem, learn
from directions import agent_of, cosine, direction, flat, gradient, logits_of, pairs, parameters_of, probabilities
from shipped import fields_of
from torch import Tensor

from agents.algorithms.cispo import CISPO
from agents.algorithms.dapo import DAPO, DAPOConfig
from agents.algorithms.dr_grpo import DrGRPO
from agents.algorithms.gspo import GSPO
from agents.algorithms.reinforce_pp import REINFORCEPlusPlus
from agents.algorithms.sapo import SAPO
from agents.groups import GroupAgent
from agents.on_policy import OnPolicyAgent
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.tree import Tree
from lmgym.tasks.base import Task

STANDARDISED = [DAPO, GSPO, CISPO, SAPO]
MEANS_OF_RESPONSES = (GSPO, SAPO)  # the others sum over tokens


@functools.cache
def plain_task() -> Task:
    return TinyProblem().task


@pytest.fixture(scope="module")
def task() -> Task:
    """Three prompts with 156 responses each; the score rides on every token, its position and the end."""
    return plain_task()


@pytest.fixture(scope="module")
def tree(task: Task) -> Tree:
    return Tree.of(task, "train")


def setting_of(kind: type[GroupAgent], scale: str, group_size: int = 2) -> dict[str, Any]:
    return fields_of(kind, {"group_size": group_size, "scale": scale})


# -- expected updates ------------------------------------------------------------------------------------------------


def log_policy(agent: OnPolicyAgent, tree: Tree) -> Tensor:
    """(R,) log pi(y|x) of all responses, differentiable."""
    mask = tree.episodes.response_mask
    chosen = tree.episodes.response_ids[mask].unsqueeze(1)
    found = logits_of(agent, tree.episodes).log_softmax(-1).gather(1, chosen).squeeze(1)
    return torch.zeros(mask.shape).masked_scatter(mask, found).sum(1).double()


def expected_update(agent: OnPolicyAgent, tree: Tree, scale: str) -> Tensor:
    """(p,) the gradient of E w(y_1) A(y_1; y_2) log pi(y_1|x), over all pairs of responses, from first principles."""
    log_pi = log_policy(agent, tree)
    probs = probabilities(agent, tree)  # (X, R / X)
    log_ref = tree.episodes.ref_log_probs.double().sum(1)
    returns = (tree.episodes.scores - tree.task.kl_coef * (log_pi.detach() - log_ref)).view(probs.shape)
    gap = returns.unsqueeze(2) - returns.unsqueeze(1)
    advantages = gap / 2
    if scale == "group":
        advantages = advantages / (gap.abs() / 2**0.5 + 1e-4)
    credit = (advantages * probs.unsqueeze(1)).sum(2)
    lengths = tree.episodes.lengths.double().view(probs.shape)
    if isinstance(agent, MEANS_OF_RESPONSES):
        credit = credit / lengths
    elif isinstance(agent, DrGRPO):
        credit = credit / tree.task.max_new_tokens
    else:
        credit = credit / (probs * lengths).sum(1).mean()
    total = (probs * credit * log_pi.view(probs.shape)).sum(1).mean()
    return flat(torch.autograd.grad(total, parameters_of(agent), allow_unused=True), parameters_of(agent))


@pytest.mark.parametrize("kind", [*STANDARDISED, DrGRPO])
def test_the_expected_update_is_the_gradient_of_what_the_page_says(
    task: Task, tree: Tree, kind: type[GroupAgent]
) -> None:
    scale = "none" if kind is DrGRPO else "group"
    agent = agent_of(kind, task, **setting_of(kind, scale))
    found = direction(agent, tree, pairs(agent, tree))
    expected = expected_update(agent, tree, scale)
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("kind", [*STANDARDISED, DrGRPO])
def test_a_deviation_of_the_batch_is_a_constant(task: Task, tree: Tree, kind: type[GroupAgent]) -> None:
    """Then a sum over tokens follows the gradient of J, and a mean over a response turns from it."""
    agent = agent_of(kind, task, **setting_of(kind, "batch"))
    found = direction(agent, tree, pairs(agent, tree))
    right = gradient(agent, tree)
    assert cosine(found, expected_update(agent, tree, "batch")) > 1 - 1e-5
    if kind in MEANS_OF_RESPONSES:
        assert 0.5 < cosine(found, right) < 0.995
    else:
        assert cosine(found, right) > 1 - 1e-5
    if kind is DrGRPO:  # a group's mean holds the response itself, which takes off 1 / k; the horizon divides
        assert found.norm().item() == pytest.approx(right.norm().item() / 2 / task.max_new_tokens, rel=1e-3)


@pytest.mark.parametrize("kind", STANDARDISED)
def test_the_deviation_of_a_group_turns_the_direction(task: Task, tree: Tree, kind: type[GroupAgent]) -> None:
    agent = agent_of(kind, task, **setting_of(kind, "group"))
    assert 0.3 < cosine(direction(agent, tree, pairs(agent, tree)), gradient(agent, tree)) < 0.995


@pytest.mark.parametrize("group_size", [1, 2])
def test_reinforce_pp_follows_the_gradient_of_j(task: Task, tree: Tree, group_size: int) -> None:
    """Whitening takes off a constant and divides by another; the group's mean takes off its share of each response."""
    agent = agent_of(REINFORCEPlusPlus, task, group_size=group_size)
    ways = pairs(agent, tree)
    assert cosine(direction(agent, tree, ways), gradient(agent, tree)) > 1 - 1e-5


# -- where the update is zero ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["batch", "group"])
@pytest.mark.parametrize("kind", [DrGRPO, GSPO])
def test_at_the_optimum_no_response_has_an_advantage(
    task: Task, tree: Tree, kind: type[GroupAgent], scale: str
) -> None:
    agent = agent_of(kind, task, **setting_of(kind, scale, 4))
    episodes = tree.episodes
    log_ref = episodes.ref_log_probs.double().sum(1)
    tilted = (log_ref + episodes.scores.double() / task.kl_coef).view(len(tree.prompts), -1)
    log_ratio = tilted.log_softmax(1).flatten() - log_ref
    log_probs = episodes.ref_log_probs.clone()
    log_probs[:, 0] += log_ratio.float()  # the return asks for the sum over tokens alone
    for policy, is_optimal in ((log_probs, True), (episodes.ref_log_probs, False)):
        collected = replace(episodes, log_probs=policy, values=torch.zeros_like(policy))
        advantages, _ = agent.advantages(collected, agent.rewards(collected))
        assert (advantages.abs().max() < 0.05) == is_optimal


# -- DAPO ------------------------------------------------------------------------------------------------------------


def rare(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    """1 for about one response of six, else 0."""
    return [float(sum(ids) % 6 == 0) for ids in completion_ids]


def never(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [0.5] * len(prompts)


def dapo_of(reward: Any, **config: Any) -> tuple[DAPO, Task]:
    task = replace(plain_task(), reward=reward)
    made = DAPOConfig(batch_size=12, group_size=4, policy="mlp", width=16, minibatches=1, **config)
    return DAPO(RLHFVectorEnv(4, group_size=4, autoreset_mode="SameStep", task=task, device="cpu"), made), task


def are_mixed(scores: Tensor) -> Tensor:
    return torch.tensor([len(set(group)) > 1 for group in scores.view(-1, 4).tolist()])


def test_groups_of_equal_scores_are_sampled_again() -> None:
    agent, _ = dapo_of(rare, sampling_rounds=50)
    counts = []
    for _ in range(4):
        sampled = agent.collect()
        is_mixed = are_mixed(sampled.scores)
        assert is_mixed.sum() == 3  # a round samples no more groups than are missing
        chosen = agent.choose(sampled)
        assert torch.equal(chosen.response_ids, sampled.response_ids.view(-1, 4, 3)[is_mixed].flatten(0, 1))
        counts.append(len(is_mixed))
    assert max(counts) > 3


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_rounds_of_sampling_are_bounded_and_a_batch_is_filled_up(rounds: int) -> None:
    agent, _ = dapo_of(never, sampling_rounds=rounds)
    sampled = agent.collect()
    assert len(sampled) == 12 * rounds
    assert torch.equal(agent.choose(sampled).response_ids, sampled.response_ids[:12])
    (metrics,) = learn(agent, 1)  # the KL alone has something to say
    assert (metrics["train/mixed_groups"], metrics["train/sampled_groups"]) == (0.0, 3.0 * rounds)


def test_a_batch_that_is_filled_up_has_the_mixed_groups() -> None:
    agent, _ = dapo_of(rare, sampling_rounds=2)
    sampled = agent.collect()[:12]
    scores = torch.tensor([0.0] * 4 + [0.0, 1.0, 0.0, 0.0] + [1.0] * 4 + [1.0, 1.0, 1.0, 0.0])
    more = replace(sampled, scores=scores[:12])
    assert torch.equal(agent.choose(more).response_ids, sampled.response_ids)  # in the order of the sampling
    twice = Episodes.concatenate([more, replace(sampled, scores=scores[4:])])
    assert torch.equal(agent.choose(twice).scores, torch.cat([scores[4:8], scores[4:8], scores[12:]]))


def test_every_token_that_was_sampled_is_an_env_step_and_is_measured() -> None:
    agent, _ = dapo_of(rare, sampling_rounds=50)
    seen: list[Episodes] = []
    choose = agent.choose

    def spy(episodes: Episodes) -> Episodes:
        seen.append(episodes)
        return choose(episodes)

    agent.choose = spy  # type: ignore[method-assign]
    steps = 0
    for metrics, episodes in zip(learn(agent, 3), seen, strict=True):
        steps += episodes.num_tokens
        assert metrics["step"] == steps
        assert metrics["rollout/score"] == pytest.approx(episodes.scores.mean().item())
        assert metrics["train/mixed_groups"] == pytest.approx(are_mixed(episodes.scores).float().mean().item())
    assert max(len(episodes) for episodes in seen) > 12


def test_the_overlong_penalty_is_taken_off_the_last_reward() -> None:
    agent, task = dapo_of(rare, overlong_tokens=2, overlong_penalty=0.5)
    plain, _ = dapo_of(rare)
    episodes = plain.collect()
    gap = agent.rewards(episodes) - plain.rewards(episodes)
    for row, n in zip(gap, episodes.lengths.tolist(), strict=True):
        assert row.sum().item() == row[n - 1].item() == pytest.approx({1: 0.0, 2: -0.25, 3: -0.5}[n])
    with pytest.raises(InvalidArgumentError, match="`overlong_tokens` must be"):
        agent_of(DAPO, task, overlong_tokens=4)
