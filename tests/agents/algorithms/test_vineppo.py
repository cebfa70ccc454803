"""VinePPO: on average its values are V^pi and its update is the gradient of J; its rollouts are env steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import learn

from agents.algorithms.vineppo import VinePPO
from agents.exact import TablePolicy, exact_gradient, expected_update, make_table_agent
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import token_rewards
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.anatomy import critic_targets
from lmgym.optimum.tree import Tree
from lmgym.tasks import Task


def pay(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.3 * len(y) * (y[0] == 1) + 0.9 * (y[:2] == [2, 2]) - 0.2 * (y[-1] == 0) for y in completion_ids]


@pytest.fixture(scope="module")
def tree() -> Tree:
    """Two prompts with 15 responses each."""
    model = markov_lm(dirichlet_rows(np.random.default_rng(0), 3, 3, 8.0), ["a", "b"])
    prompts = {"test": ["a", "b"]}
    return Tree.of(Task(name="tiny", model=model, reward=pay, prompts=prompts, kl_coef=0.3, max_new_tokens=3))


def agent_of(tree: Tree, **config: Any) -> VinePPO:
    """An agent with a table away from the reference, whose critic, which it does not ask, is exact."""
    agent = make_table_agent(VinePPO, tree, **{"whiten_advantages": "none"} | config)
    assert isinstance(agent, VinePPO)
    assert isinstance(agent.policy, TablePolicy)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        agent.policy.logits += 0.5 * torch.randn(agent.policy.logits.shape, generator=generator, dtype=torch.float64)
    agent.policy.set_critic(critic_targets(tree, agent.policy.log_probs()))
    agent.num_timesteps = 1
    return agent


@pytest.mark.parametrize("rollouts", [1, 3])
def test_the_values_are_v_of_the_policy_on_average(tree: Tree, rollouts: int) -> None:
    agent = agent_of(tree, batch_size=1200, rollouts=rollouts)
    assert isinstance(agent.policy, TablePolicy)
    episodes = agent.collect()
    assert episodes.values is not None
    found = episodes.values[episodes.response_mask].double()
    states = agent.policy.states(episodes)
    zs = []
    for state in states.unique():
        here = found[states == state]
        if len(here) > 40:
            zs.append((here.mean() - agent.policy.critic[state].item()) / here.std() * len(here) ** 0.5)
    assert len(zs) >= 8
    assert torch.stack(zs).abs().max() < 4
    spread = found[states == 0].std()
    assert 0.5 < spread * rollouts**0.5 / agent_spread(tree, agent) < 2


def agent_spread(tree: Tree, agent: VinePPO) -> float:
    """The exact standard deviation of the returns of responses to the first prompt."""
    assert isinstance(agent.policy, TablePolicy)
    log_probs = tree.responses.add_up(agent.policy.log_probs())[0]
    reference = tree.responses.add_up(tree.reference)[0]
    returns = tree.scores[0] - 0.3 * (log_probs - reference)
    mean = log_probs.exp() @ returns
    return float((log_probs.exp() @ (returns - mean) ** 2) ** 0.5)


@pytest.mark.parametrize("segment", [1, 2, 3])
def test_with_values_as_they_are_on_average_the_expected_update_is_the_gradient_of_j(tree: Tree, segment: int) -> None:
    agent = agent_of(tree, segment=segment)
    assert isinstance(agent.policy, TablePolicy)
    gradient = exact_gradient(agent, tree)
    assert torch.cosine_similarity(expected_update(agent, tree), gradient, 0).item() > 1 - 1e-9
    with torch.no_grad():
        agent.policy.critic *= 0.5
    is_baseline = segment == 3  # where V is asked at the first state alone
    assert (torch.cosine_similarity(expected_update(agent, tree), gradient, 0).item() > 1 - 1e-9) == is_baseline


@pytest.mark.parametrize("segment", [1, 2])
def test_the_mean_of_sampled_updates_is_the_expected_one(tree: Tree, segment: int) -> None:
    agent = agent_of(tree, segment=segment, batch_size=64)
    expected = expected_update(agent, tree)
    sampled = []
    for _ in range(40):
        total = sum(loss for loss, _ in agent.losses(agent.shape(agent.collect())))
        sampled.append(-torch.autograd.grad(total, agent.policy.policy_parameters())[0].flatten())
    updates = torch.stack(sampled)
    often = (updates != 0).double().mean(0) > 0.9
    errors = updates.std(0)[often] / len(updates) ** 0.5
    assert often.sum() >= 9
    assert ((updates.mean(0) - expected)[often] / errors).abs().max() < 4
    assert ((updates.mean(0) + expected)[often] / errors).abs().max() > 4


def test_the_tokens_of_rollouts_are_env_steps_and_are_read(tree: Tree) -> None:
    agent = agent_of(tree, batch_size=16, rollouts=2, segment=2)
    scored = []
    grade = agent.envs.engine.grade

    def spy(prompts: Any, responses: Any, by_eos: Any) -> Any:
        scored.append(responses)
        return grade(prompts, responses, by_eos)

    agent.envs.engine.grade = spy  # type: ignore[method-assign]
    episodes = agent.collect()
    lengths = episodes.lengths
    tokens = [[len(response) for response in batch] for batch in scored]
    parts = [tokens[0], [n for batch in tokens[1:3] for n in batch], [n - 2 for batch in tokens[3:] for n in batch]]
    assert [len(part) for part in parts] == [16, 2 * 16, 2 * int((lengths > 2).sum())]
    assert sum(parts[0]) == episodes.num_tokens
    steps = agent.num_timesteps
    assert steps - 1 == agent.rollout_tokens == sum(parts[1]) + sum(parts[2])
    read = sum(n for batch in tokens for n in batch) + len(
        [n for batch in tokens for n in batch]
    )  # a prompt is a token
    assert agent.tokens.forward == read
    metrics = learn(agent, 1)[0]
    learned = round(16 * metrics["rollout/length"])
    assert metrics["step"] == steps + learned + metrics["train/rollout_tokens"]


def test_a_new_forward_changes_log_probs_and_not_values(tree: Tree) -> None:
    agent = agent_of(tree, recompute_log_probs=True, batch_size=16)
    agent.policy = agent.new_policy(0)
    episodes = agent.collect()
    assert torch.equal(agent.shape(episodes).episodes.values, episodes.values)  # type: ignore[arg-type]


def test_rollouts_have_the_scores_that_are_learned_from(tree: Tree) -> None:
    agent = agent_of(tree, score_clip=0.1, batch_size=64)
    bare: Episodes = agent.collect()
    assert bare.values is not None
    loose = agent_of(tree, batch_size=64).collect()
    assert loose.values is not None
    assert loose.values.max() > bare.values.max() + 0.3


def test_a_late_kl_is_charged_where_it_arises(tree: Tree) -> None:
    agent = agent_of(tree, batch_size=8)
    episodes = agent.collect()
    agent.envs.engine.task = replace(agent.envs.engine.task, dense_kl=False)
    assert torch.equal(agent.rewards(episodes), token_rewards(episodes, 0.3))


def test_what_cannot_be_is_refused(tree: Tree) -> None:
    with pytest.raises(InvalidArgumentError, match="`collect` must be 'episodes' where rollouts start inside"):
        VinePPO.Config(collect="steps")
