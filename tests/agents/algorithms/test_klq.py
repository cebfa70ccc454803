"""KLQ against its definition, response by response, and its first step on a batch against that of A2C."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyProblem
from directions import DISCOUNT, agent_of, as_collected, cosine, flat, gradient, parameters_of
from torch import Tensor

from agents.algorithms.a2c import A2C
from agents.algorithms.klq import KLQ
from agents.batch import Batch
from agents.on_policy import OnPolicyAgent
from agents.policies.actor_critic import Read
from lmgym.episodes import Episodes
from lmgym.optimum.tree import Tree, make_episode_logits


class Table(torch.nn.Module):
    """A policy and critic with parameters of their own for every prefix of a tree, in float64."""

    device = torch.device("cpu")

    def __init__(self, tree: Tree, logits: Tensor, values: Tensor) -> None:
        super().__init__()
        self.logits, self.values = (torch.nn.Parameter(x.double().clone()) for x in (logits, values))
        self.tree = tree
        self.numbers: dict[tuple[int, ...], int] = {}
        for episode, response in zip(tree.episodes.prompt_index.tolist(), self._responses(), strict=True):
            for t in range(len(response)):
                self.numbers.setdefault((episode, *response[:t]), len(self.numbers))

    def _responses(self) -> list[list[int]]:
        lengths = self.tree.episodes.lengths.tolist()
        return [ids[:n] for ids, n in zip(self.tree.episodes.response_ids.tolist(), lengths, strict=True)]

    def states(self) -> Tensor:
        """(n,) number of the state of each chosen token of the tree's episodes."""
        index = self.tree.episodes.prompt_index.tolist()
        found = [
            self.numbers[(i, *ids[:t])]
            for i, ids in zip(index, self._responses(), strict=True)
            for t in range(len(ids))
        ]
        return torch.tensor(found)

    def read(self, episodes: Episodes) -> Read:
        """Of the tree's own episodes, in their order."""
        states = self.states()
        return Read(self.logits[states], self.values[states], self.values[states, None])


def tabular(tree: Tree, *, moved: float = 0.0, **config: Any) -> OnPolicyAgent:
    """KLQ at pi* and V*, or so far from them."""
    agent = agent_of(KLQ, tree.task, **config)
    stepped = tree.solve().policy
    logits_at = []
    values_at = []
    mask = tree.episodes.response_mask
    assert stepped is not None
    state = stepped.begin(tree.episodes.prompt_ids, tree.episodes.prompt_mask, mask.shape[1])
    for t in range(mask.shape[1]):
        logits_at.append(state.logits.clone())
        values_at.append(state.values.clone())  # type: ignore[union-attr]
        state.step(tree.episodes.response_ids[:, t])
    table = Table(tree, torch.zeros(1), torch.zeros(1))
    states = table.states()
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros((len(table.numbers), tree.responses.vocab_size), dtype=torch.float64)
    values = torch.zeros(len(table.numbers), dtype=torch.float64)
    logits[states] = torch.stack(logits_at, 1)[mask]
    values[states] = torch.stack(values_at, 1)[mask]
    logits, values = (x + moved * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (logits, values))
    agent.policy = Table(tree, logits, values)  # type: ignore[assignment]
    return agent


def tabular_ways(agent: OnPolicyAgent, tree: Tree) -> tuple[Episodes, Tensor]:
    """The tree's episodes as collected with a table, and (R,) the probability of each."""
    episodes = as_collected(agent, tree.episodes)
    return episodes, (episodes.log_probs.sum(1).exp() / len(tree.prompts)).detach()


def q_gradient(agent: OnPolicyAgent, tree: Tree) -> tuple[float, Tensor]:
    """The expected loss of KLQ, and its gradient (p,)."""
    episodes, probs = tabular_ways(agent, tree)
    advantages, returns = agent.advantages(episodes, agent.rewards(episodes))
    mask = episodes.response_mask
    read = agent.read(Batch(episodes, advantages, returns), torch.tensor(len(episodes)), len(episodes))
    loss, _ = agent.loss(replace(read, weights=probs.unsqueeze(1).expand_as(mask)[mask]))
    return loss.item(), flat(torch.autograd.grad(loss, parameters_of(agent)), parameters_of(agent))


def slow_q_gradient(agent: OnPolicyAgent, tree: Tree) -> tuple[float, Tensor]:
    """The same from the definition, response by response: Q to Q + sum_k (gamma lambda)^k delta_(t+k), held.

    V takes the share of its own gradient that log pi has by itself, kl_coef.
    """
    episodes, probs = tabular_ways(agent, tree)
    price = tree.task.kl_coef
    gamma = tree.task.gamma
    decay = agent.config.td_lambda  # type: ignore[attr-defined]
    read = agent.policy.read(episodes)
    total = torch.zeros((), dtype=torch.float64)
    position = 0
    log_distribution = read.logits.log_softmax(-1)
    for i in range(len(episodes)):
        n = int(episodes.lengths[i])
        score = tree.scores.flatten()[i].item()
        tokens = episodes.response_ids[i, :n]
        at = torch.arange(position, position + n)
        values = read.values[at]
        q = values + price * (log_distribution[at, tokens] - episodes.ref_log_probs[i, :n])
        for t in range(n):
            target = q[t].item()
            for k in range(t, n):
                after = score if k == n - 1 else gamma * values[k + 1].item()
                target += (gamma * decay) ** (k - t) * (after - q[k].item())
            total = total + probs[i] * 0.5 * (q[t] - target).square()
        position += n
    by_logit, by_value = torch.autograd.grad(total, parameters_of(agent))
    return total.item(), flat([by_logit, price * by_value], parameters_of(agent))


@pytest.mark.parametrize("gamma", [1.0, DISCOUNT])
@pytest.mark.parametrize("td_lambda", [0.0, 0.9, 1.0])
def test_klq_stands_still_at_the_optimum_and_only_there(gamma: float, td_lambda: float) -> None:
    tree = Tree.of(TinyProblem(gamma=gamma).task, "train")
    at, near = (q_gradient(tabular(tree, moved=moved, td_lambda=td_lambda), tree) for moved in (0.0, 0.01))
    # The reference's log-probs of the episodes are float32, and so is the score.
    assert at[0] < 1e-12
    assert at[1].norm() < 1e-6 < 1e-3 * near[1].norm()


@pytest.mark.parametrize("gamma", [1.0, DISCOUNT])
@pytest.mark.parametrize("td_lambda", [0.0, 0.9, 1.0])
def test_klq_follows_the_semi_gradient_of_its_squared_error(gamma: float, td_lambda: float) -> None:
    tree = Tree.of(TinyProblem(gamma=gamma).task, "train")
    agent = tabular(tree, moved=0.5, td_lambda=td_lambda)
    loss, found = q_gradient(agent, tree)
    expected, right = slow_q_gradient(agent, tree)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert right.norm() > 0.01


def test_the_value_of_klq_is_the_soft_value_of_its_q() -> None:
    """V(s) = kl_coef log sum_a pi_ref(a|s) exp(Q(s, a) / kl_coef) for any policy and critic."""
    tree = Tree.of(TinyProblem().task, "train")
    agent = tabular(tree, moved=0.5)
    price = tree.task.kl_coef
    read = agent.policy.read(tree.episodes)
    ref = make_episode_logits(tree.task.reference("cpu"))(tree.episodes).double().log_softmax(-1)
    q = read.values.unsqueeze(1) + price * (read.logits.log_softmax(-1) - ref)
    torch.testing.assert_close(price * (ref + q / price).logsumexp(1), read.values, rtol=0, atol=1e-9)


# -- the first step on a batch ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1.0, DISCOUNT])
def tree(request: pytest.FixtureRequest) -> Tree:
    return Tree.of(TinyProblem(gamma=request.param).task, "train")


def policy_part(tree: Tree, td_lambda: float) -> Tensor:
    """(p,) what KLQ's policy goes along, with V held, in expectation over all responses."""
    agent = agent_of(KLQ, tree.task, td_lambda=td_lambda)
    episodes, probs = tabular_ways(agent, tree)
    mask = episodes.response_mask
    targets = agent.advantages(episodes, agent.rewards(episodes))
    batch = agent.read(Batch(episodes, *targets), torch.tensor(len(episodes)), len(episodes))
    weights = probs.unsqueeze(1).expand_as(mask)[mask]
    loss, _ = agent.loss(replace(batch, values=batch.values.detach(), weights=weights))
    return flat(torch.autograd.grad(-loss, parameters_of(agent), allow_unused=True), parameters_of(agent))


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_first_step_is_kl_coef_times_that_of_a2c(tree: Tree, decay: float) -> None:
    klq = agent_of(KLQ, tree.task, td_lambda=decay)
    a2c = agent_of(A2C, tree.task, gae_lambda=decay, vf_coef=1.0)
    _, found = q_gradient(klq, tree)
    _, other = q_gradient(a2c, tree)
    torch.testing.assert_close(found, tree.task.kl_coef * other, rtol=0, atol=1e-5 * other.norm().item())
    _, free = q_gradient(agent_of(A2C, tree.task, gae_lambda=decay, vf_coef=0.0), tree)
    assert cosine(free, other) < 0.99  # the critic has a share in it


def test_the_policy_follows_kl_coef_times_the_gradient_of_j(tree: Tree) -> None:
    """At gamma = 1 and lambda = 1, where neither the critic nor a state's discount is in the way."""
    found = policy_part(tree, td_lambda=1.0)
    right = gradient(agent_of(KLQ, tree.task), tree)
    if tree.task.gamma < 1:
        assert cosine(found, right) < 0.97
    else:
        torch.testing.assert_close(found, tree.task.kl_coef * right, rtol=0, atol=1e-5 * right.norm().item())
    assert cosine(policy_part(tree, td_lambda=0.5), right) < 0.99
