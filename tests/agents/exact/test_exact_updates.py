"""The exact expected update of every loss, against means of sampled updates, the gradient of J and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.agent import Agent
from agents.algorithms.a2c import A2C
from agents.algorithms.cispo import CISPO
from agents.algorithms.dapo import DAPO
from agents.algorithms.dr_grpo import DrGRPO
from agents.algorithms.grpo import GRPO
from agents.algorithms.gspo import GSPO
from agents.algorithms.klq import KLQ
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.algorithms.sapo import SAPO
from agents.exact import (
    TablePolicy,
    enumerate_updates,
    exact_gradient,
    expected_update,
    find_fixed_point,
    make_table_agent,
    measure_updates,
)
from agents.exact.batches import judge_each
from agents.on_policy import OnPolicyAgent
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.anatomy import critic_targets
from lmgym.optimum.tree import Tree
from lmgym.tasks import Task

UNBIASED: list[tuple[type[OnPolicyAgent], dict[str, Any]]] = [
    (REINFORCE, {"baseline": "none"}),
    (REINFORCE, {"baseline": "moving_average"}),
    (REINFORCE, {"baseline": "value"}),
    (A2C, {"gae_lambda": 1.0}),
    (PPO, {"gae_lambda": 1.0, "whiten_advantages": "none"}),
    (KLQ, {"td_lambda": 1.0}),
    (RLOO, {"group_size": 2}),
]
BIASED: list[tuple[type[OnPolicyAgent], dict[str, Any]]] = [
    (GRPO, {"group_size": 2}),
    (GRPO, {"group_size": 2, "length_mean": False, "kl_estimator": "exact"}),
    (GRPO, {"group_size": 2, "scale_by_std": False, "kl_estimator": "k2"}),
    (GRPO, {"group_size": 2, "scale_by_std": False, "length_mean": False, "kl_estimator": "k3"}),
    (GRPO, {"group_size": 2, "scale_by_std": False, "length_mean": False, "kl_estimator": "k1"}),
]
KL_IN_THE_REWARD: list[tuple[type[OnPolicyAgent], dict[str, Any]]] = [
    (DrGRPO, {"group_size": 2}),
    (DAPO, {"group_size": 2, "scale": "group", "sampling_rounds": 1}),
    (GSPO, {"group_size": 2, "scale": "group"}),
    (CISPO, {"group_size": 2, "scale": "group"}),
    (SAPO, {"group_size": 2, "scale": "group"}),
]
KL_COEF = 0.3


def pay(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.3 * len(y) * (y[0] == 1) + 0.9 * (y[:2] == [2, 2]) - 0.2 * (y[-1] == 0) for y in completion_ids]


def make_tree(horizon: int = 2, reward: Any = pay) -> Tree:
    """Two prompts with 7 responses each at a horizon of 2."""
    rows = dirichlet_rows(np.random.default_rng(0), 3, 3, 8.0)
    model = markov_lm(rows, ["a", "b"])
    prompts = {"test": ["a", "b"]}
    task = Task(name="tiny", model=model, reward=reward, prompts=prompts, kl_coef=KL_COEF, max_new_tokens=horizon)
    return Tree.of(task)


@pytest.fixture(scope="module")
def tree() -> Tree:
    return make_tree()


def agent_of(kind: type[OnPolicyAgent], tree: Tree, config: dict[str, Any], *, moved: bool = True) -> OnPolicyAgent:
    """An agent with a table, away from the reference."""
    agent = make_table_agent(kind, tree, **{"batch_size": 32, "epochs": 1, "minibatches": 1} | config)
    generator = torch.Generator().manual_seed(2)
    if moved:
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        agent.num_timesteps = 1
    return agent


# -- the expected update ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches(tree: Tree) -> list[Episodes]:
    """Sampled with the policy that all agents here have, in groups of two."""
    agent = agent_of(RLOO, tree, {"group_size": 2})
    return [agent.collect() for _ in range(40)]


@pytest.mark.parametrize(("kind", "config"), UNBIASED + BIASED + KL_IN_THE_REWARD, ids=str)
def test_it_is_the_mean_of_many_sampled_updates(
    tree: Tree, batches: list[Episodes], kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    agent = agent_of(kind, tree, config)
    exact = expected_update(agent, tree)
    sampled = []
    for episodes in batches:
        agent.average = 0.0  # the moving average of REINFORCE is held
        total = sum(loss for loss, _ in agent.losses(agent.shape(episodes)))
        sampled.append(-torch.autograd.grad(total, agent.policy.policy_parameters())[0].flatten())
    updates = torch.stack(sampled)
    often = (updates != 0).double().mean(0) > 0.9  # visited by nearly every batch: its mean is close to normal
    errors = updates.std(0)[often] / len(updates) ** 0.5
    assert often.sum() >= 9
    assert ((updates.mean(0) - exact)[often] / errors).abs().max() < 4
    assert ((updates.mean(0) + exact)[often] / errors).abs().max() > 4  # there is something to see


@pytest.mark.parametrize(("kind", "config"), UNBIASED, ids=str)
def test_the_unbiased_ones_go_along_the_gradient_of_j(
    tree: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    agent = agent_of(kind, tree, config)
    cosine = torch.cosine_similarity(expected_update(agent, tree), exact_gradient(agent, tree), 0)
    assert cosine.item() > 1 - 1e-9


@pytest.mark.parametrize(
    ("kind", "config"), [(REINFORCE, {"baseline": "value"}), (RLOO, {"group_size": 2}), (GRPO, {"group_size": 2})]
)
def test_it_is_the_mean_over_all_batches_where_nothing_is_divided_by_a_batch_s_tokens(
    tree: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    agent = agent_of(kind, tree, config)
    stale = agent_of(kind, tree, config, moved=False)
    for behaviour in (None, lambda episodes: stale.policy.read(episodes).logits):
        found = enumerate_updates(agent, tree, behaviour=behaviour)
        assert found.probs.sum().item() == pytest.approx(1)
        torch.testing.assert_close(found.mean, expected_update(agent, tree, behaviour))


def test_stale_samples_change_the_update(tree: Tree) -> None:
    agent = agent_of(RLOO, tree, {"group_size": 2})
    stale = agent_of(RLOO, tree, {"group_size": 2}, moved=False)
    found = expected_update(agent, tree, lambda episodes: stale.policy.read(episodes).logits)
    assert torch.cosine_similarity(found, exact_gradient(agent, tree), 0) < 0.99


def test_an_exact_critic_lowers_the_variance_and_leaves_no_bias(tree: Tree) -> None:
    plain = agent_of(REINFORCE, tree, {"baseline": "none"})
    judged = agent_of(REINFORCE, tree, {"baseline": "value"})
    assert isinstance(judged.policy, TablePolicy)
    judged.policy.set_critic(critic_targets(tree, judged.policy.log_probs()))
    qualities = [measure_updates(agent, tree) for agent in (plain, judged)]
    assert max(quality.bias for quality in qualities) < 1e-12
    assert qualities[1].variance < 0.8 * qualities[0].variance


def test_batches_of_two_groups_have_half_the_variance() -> None:
    tree = make_tree(horizon=1)
    agent = agent_of(RLOO, tree, {"group_size": 2})
    one, two = (measure_updates(agent, tree, groups) for groups in (1, 2))
    assert two.variance == pytest.approx(one.variance / 2)


def test_the_agent_comes_out_as_it_went_in(tree: Tree) -> None:
    agent = agent_of(REINFORCE, tree, {"baseline": "moving_average"})
    before = (agent.state()["own"], agent.state()["tokens"])
    expected_update(agent, tree)
    assert before == (agent.state()["own"], agent.state()["tokens"])


@pytest.mark.parametrize("whitening", ["batch", "minibatch"])
def test_an_agent_that_looks_at_the_whole_batch_is_refused(tree: Tree, whitening: str) -> None:
    agent = agent_of(PPO, tree, {"whiten_advantages": whitening})
    with pytest.raises(InvalidArgumentError, match="must judge a group by itself"):
        expected_update(agent, tree)


def test_too_large_a_tree_is_refused(tree: Tree) -> None:
    with pytest.raises(InvalidArgumentError, match="in at most 1,000,000 ways, got"):
        judge_each(torch.full((1, 30), 1 / 30), torch.arange(30), 8)


# -- fixed points ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config"), UNBIASED[2:] + KL_IN_THE_REWARD, ids=str)
def test_iterated_the_unbiased_ones_reach_the_optimum(
    tree: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    """And those that divide by a deviation or a length: at the optimum there is nothing to divide."""
    found = find_fixed_point(agent_of(kind, tree, config), tree, tolerance=1e-5)
    assert found.converged
    assert found.inside
    assert abs(found.gap) < 1e-6
    assert found.gap == pytest.approx(KL_COEF * found.to_optimum, abs=1e-9)


def test_an_agent_that_drops_groups_has_no_expected_update_here(tree: Tree) -> None:
    agent = agent_of(DAPO, tree, {"group_size": 2, "batch_size": 2})
    with pytest.raises(InvalidArgumentError, match="`agent` must learn from every episode that it samples, and DAPO"):
        expected_update(agent, tree)


def test_plain_steps_and_stale_samples_end_in_the_same_point(tree: Tree) -> None:
    config = {"group_size": 2, "scale_by_std": False}
    ways: list[dict[str, Any]] = [{}, {"steps": "plain", "rate": 3.0}, {"staleness": 1, "rate": 0.5}]
    points = [find_fixed_point(agent_of(GRPO, tree, config, moved=False), tree, tolerance=1e-4, **way) for way in ways]
    assert points[0].gap > 1e-2
    for point in points:
        assert point.converged
        assert point.value == pytest.approx(points[0].value, abs=1e-4)


def slow_update(point: list[torch.Tensor], tree: Tree, kl: str, *, scale: bool, length: bool) -> torch.Tensor:
    """The expected update of GRPO with groups of two, at one token after another: plain loops over pairs."""
    probs = tree.responses.add_up(point).exp()
    per_prompt = tree.responses.per_prompt
    ids = tree.episodes.response_ids
    lengths = tree.episodes.lengths
    update: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    for x in range(len(probs)):
        for i in range(per_prompt):
            row = x * per_prompt + i
            advantage = 0.0
            for j in range(per_prompt):
                mean = (tree.scores[x, i] + tree.scores[x, j]) / 2
                spread = (tree.scores[x, i] - tree.scores[x, j]).abs() / 2**0.5 + 1e-4
                advantage += probs[x, j] * (tree.scores[x, i] - mean) / (spread if scale else 1.0)
            share = probs[x, i] / len(probs) / (lengths[row] if length else 2)
            node = 0
            for t in range(int(lengths[row])):
                level = tree.responses.levels[t]
                own = point[t][x, node]
                ratio = own - tree.reference[t][x, node]
                token = int((tree.responses.legal == ids[row, t]).nonzero())
                chosen = torch.eye(3, dtype=torch.float64)[token] - own.exp()
                price = {"k1": 1.0, "k2": ratio[token], "k3": 1 - (-ratio[token]).exp()}
                priced = own.exp() * (ratio - own.exp() @ ratio) if kl == "exact" else price[kl] * chosen
                key = (x, tuple(ids[row, :t].tolist()))
                update[key] = update.get(key, 0.0) + share * (advantage * chosen - KL_COEF * priced)
                if token in level.going:
                    node = node * len(level.going) + int((level.going == token).nonzero())
    return torch.stack(list(update.values()))


@pytest.mark.parametrize(("kind", "config"), BIASED, ids=str)
def test_the_biased_ones_stop_where_plain_loops_say_that_they_do(
    tree: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    agent = agent_of(kind, tree, config)
    choice = agent.config
    assert isinstance(choice, GRPO.Config)
    ways = {"scale": choice.scale_by_std, "length": choice.length_mean}
    start = agent.policy.log_probs()  # type: ignore[operator]
    moved = slow_update(start, tree, choice.kl_estimator, **ways)
    assert moved.norm().item() == pytest.approx(expected_update(agent, tree).norm().item(), rel=1e-5)
    found = find_fixed_point(agent, tree, tolerance=1e-6)
    assert found.converged
    assert found.gap > 1e-3
    assert found.inside == (choice.kl_estimator != "k1")
    assert slow_update(found.log_probs, tree, choice.kl_estimator, **ways).norm() < 3e-6
    other = slow_update(found.log_probs, tree, choice.kl_estimator, scale=not ways["scale"], length=ways["length"])
    assert other.norm() > 1e-3 or choice.kl_estimator == "k1"


def test_a_group_of_two_with_scores_of_0_and_1_multiplies_the_score() -> None:
    """In closed form, a token an answer: the advantage of 1 against 0 is c, and so is the weight of the score."""
    tree = make_tree(1, lambda prompts, completions, completion_ids, **_: [float(y == [1]) for y in completion_ids])
    for scale, weight in ((False, 0.5), (True, 0.5 / (0.5**0.5 + 1e-4))):
        config = {"group_size": 2, "scale_by_std": scale, "kl_estimator": "exact"}
        found = find_fixed_point(agent_of(GRPO, tree, config), tree)
        expected = (tree.reference[0] + weight * tree.scores[:, None, :] / KL_COEF).log_softmax(-1)
        torch.testing.assert_close(found.log_probs[0], expected, atol=1e-5, rtol=0)


def test_only_a_table_has_a_fixed_point(tree: Tree) -> None:
    agent: Agent = agent_of(RLOO, tree, {"group_size": 2})
    assert isinstance(agent, OnPolicyAgent)
    agent.policy = agent.new_policy(0)
    assert expected_update(agent, tree).isfinite().all()  # of a network there is an expected update
    with pytest.raises(InvalidArgumentError, match="make_table_agent"):
        find_fixed_point(agent, tree)
