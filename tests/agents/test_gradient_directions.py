"""Where each algorithm's update points, in expectation over all responses, against the exact gradient of its objective.

Nothing is sampled but where it says so: a response counts with its probability, a group of two with the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import TinyProblem
from torch import Tensor
from torch.nn.functional import cosine_similarity

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.klq import KLQ
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.on_policy import OnPolicyAgent
from agents.policies.actor_critic import Read
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.kl import exact
from lmgym.optimum.tree import Tree, law_of
from lmgym.tasks.base import Task

DISCOUNT = 0.3


@pytest.fixture(scope="module")
def task() -> Task:
    """Three prompts with 156 responses each; the score rides on every token, its place and the end."""
    return TinyProblem().task


@pytest.fixture(scope="module")
def tree(task: Task) -> Tree:
    return Tree.of(task, "train")


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


def law(agent: OnPolicyAgent, episodes: Episodes) -> Tensor:
    return agent.policy.read(episodes).logits


def probabilities(agent: OnPolicyAgent, tree: Tree) -> Tensor:
    """(X, R / X) of the responses of each prompt."""
    return tree.evaluate(lambda episodes: law(agent, episodes)).log_probs.exp().view(tree.scores.shape)


def alone(agent: OnPolicyAgent, tree: Tree) -> Ways:
    """Every response, by itself."""
    probs = probabilities(agent, tree)
    return Ways(torch.arange(probs.numel()), probs.flatten() / len(probs))


def pairs(agent: OnPolicyAgent, tree: Tree) -> Ways:
    """Every group of two responses to one prompt, one behind the other; each of the two counts half."""
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
    count, weight = len(every), torch.zeros(len(every), dtype=torch.float64).index_add_(0, ways.rows, ways.weights)
    summed = torch.zeros((count, advantages.shape[1]), dtype=torch.float64)
    summed.index_add_(0, ways.rows, ways.weights.unsqueeze(1) * advantages.double())
    mean = (summed / weight.clamp(min=1e-300).unsqueeze(1) * scored).float()
    read = agent._read(every, mean, torch.zeros_like(mean), torch.arange(count), torch.tensor(count), count)
    a_token = weight.unsqueeze(1).expand_as(every.response_mask)[every.response_mask].float()
    tokens = weight @ every.lengths.double()  # of an episode, on average
    loss, _ = agent.loss(replace(read, weights=a_token / tokens, episode_weights=a_token))
    found = torch.autograd.grad(-loss, parameters_of(agent), allow_unused=True)
    return flat(found, parameters_of(agent))


def gradient(agent: OnPolicyAgent, tree: Tree) -> Tensor:
    """(p,) of J, exact."""
    parameters = parameters_of(agent)
    _, found = tree.gradient(lambda episodes: law(agent, episodes), parameters)
    return flat(found, parameters)


def cosine(a: Tensor, b: Tensor) -> float:
    return cosine_similarity(a, b, dim=0).item()


def test_the_policy_is_away_from_the_reference(task: Task, tree: Tree) -> None:
    agent = agent_of(REINFORCE, task)
    assert 0.3 < tree.evaluate(lambda episodes: law(agent, episodes)).kl.mean().item() < 1.0
    for ways in (alone(agent, tree), pairs(agent, tree)):
        assert ways.weights.sum().item() == pytest.approx(1, abs=1e-6)


# -- the gradient of J -----------------------------------------------------------------------------------------------

UNBIASED = [
    (REINFORCE, {"baseline": "none"}),
    (REINFORCE, {"baseline": "moving_average"}),
    (REINFORCE, {"baseline": "value", "vf_coef": 0.0}),
    (A2C, {"gae_lambda": 1.0, "vf_coef": 0.0}),
    (PPO, {"gae_lambda": 1.0, "vf_coef": 0.0, "whiten_advantages": "none"}),
    (RLOO, {"group_size": 2}),
]


def ways_of(agent: OnPolicyAgent, tree: Tree) -> Ways:
    return pairs(agent, tree) if agent.config.responses == 2 else alone(agent, tree)


@pytest.mark.parametrize(("kind", "config"), UNBIASED, ids=str)
def test_the_expected_update_is_along_the_gradient_of_j(
    task: Task, tree: Tree, kind: type[OnPolicyAgent], config: dict[str, Any]
) -> None:
    agent = agent_of(kind, task, **config)
    if config.get("baseline") == "moving_average":
        agent.restore_own_state({"average": 0.7})
    found, right = direction(agent, tree, ways_of(agent, tree)), gradient(agent, tree)
    assert cosine(found, right) > 1 - 1e-5
    tokens = probabilities(agent, tree).flatten() @ tree.episodes.lengths.double() / len(tree.prompts)
    a_mean_of = tokens.item() if kind in (A2C, PPO) else 1.0  # over tokens; J is one over episodes
    assert found.norm().item() * a_mean_of == pytest.approx(right.norm().item(), rel=1e-3)
    # Both halves of the KL are in it: without, it would be another direction.
    free = Tree.of(replace(task, kl_coef=0.0), "train")
    assert cosine(gradient(agent, free), right) < 0.95


def test_a_baseline_of_the_other_episodes_leaves_the_gradient_of_j(task: Task, tree: Tree) -> None:
    agent = agent_of(REINFORCE, task, baseline="mean")
    found, right = direction(agent, tree, drawn(agent, tree, 200_000)), gradient(agent, tree)
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
    before = tree.evaluate(lambda episodes: law(agent, episodes)).value
    with torch.no_grad():
        parameters = parameters_of(agent)
        for parameter, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            parameter += part.view_as(parameter)
    assert tree.evaluate(lambda episodes: law(agent, episodes)).value > before


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
    own = law(agent, tree.episodes).double().log_softmax(-1)
    ref = law_of(tree.task.reference("cpu"))(tree.episodes).double().log_softmax(-1)
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


def test_the_two_parts_of_grpo_add_up(task: Task, tree: Tree) -> None:
    agent = agent_of(GRPO, task, **DR)
    whole = direction(agent, tree, pairs(agent, tree))
    score, (_, pull) = score_part(tree, task)[0], kl_part(tree, "k3")
    torch.testing.assert_close(whole, score + task.kl_coef * pull / task.max_new_tokens, rtol=1e-3, atol=1e-6)


# -- KLQ -------------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A policy and critic with parameters of their own for every prefix of a tree, in float64."""

    device = torch.device("cpu")

    def __init__(self, tree: Tree, logits: Tensor, values: Tensor) -> None:
        super().__init__()
        self.logits, self.values = (torch.nn.Parameter(x.double().clone()) for x in (logits, values))
        self.tree = tree
        self.places: dict[tuple[int, ...], int] = {}
        for episode, response in zip(tree.episodes.prompt_index.tolist(), self._responses(), strict=True):
            for t in range(len(response)):
                self.places.setdefault((episode, *response[:t]), len(self.places))

    def _responses(self) -> list[list[int]]:
        lengths = self.tree.episodes.lengths.tolist()
        return [ids[:n] for ids, n in zip(self.tree.episodes.response_ids.tolist(), lengths, strict=True)]

    def states(self) -> Tensor:
        """(n,) number of the state of each chosen token of the tree's episodes."""
        index = self.tree.episodes.prompt_index.tolist()
        found = [
            self.places[(i, *ids[:t])] for i, ids in zip(index, self._responses(), strict=True) for t in range(len(ids))
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
    law_at, values_at = [], []
    mask = tree.episodes.response_mask
    assert stepped is not None
    state = stepped.begin(tree.episodes.prompt_ids, tree.episodes.prompt_mask, mask.shape[1])
    for t in range(mask.shape[1]):
        law_at.append(state.logits.clone())
        values_at.append(state.values.clone())  # type: ignore[union-attr]
        state.step(tree.episodes.response_ids[:, t])
    table = Table(tree, torch.zeros(1), torch.zeros(1))
    states, generator = table.states(), torch.Generator().manual_seed(0)
    logits = torch.zeros((len(table.places), tree.vocab_size), dtype=torch.float64)
    values = torch.zeros(len(table.places), dtype=torch.float64)
    logits[states], values[states] = torch.stack(law_at, 1)[mask], torch.stack(values_at, 1)[mask]
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
    every, mask = torch.arange(len(episodes)), episodes.response_mask
    read = agent._read(episodes, advantages, returns, every, torch.tensor(len(episodes)), len(episodes))
    loss, _ = agent.loss(replace(read, weights=probs.unsqueeze(1).expand_as(mask)[mask]))
    return loss.item(), flat(torch.autograd.grad(loss, parameters_of(agent)), parameters_of(agent))


def slow_q_gradient(agent: OnPolicyAgent, tree: Tree) -> tuple[float, Tensor]:
    """The same from the definition, response by response: Q to Q + sum_k (gamma lambda)^k delta_(t+k), held.

    V takes the share of its own gradient that log pi has by itself, kl_coef.
    """
    episodes, probs = tabular_ways(agent, tree)
    price, gamma, decay = tree.task.kl_coef, tree.task.gamma, agent.config.td_lambda  # type: ignore[attr-defined]
    read, total, place = agent.policy.read(episodes), torch.zeros((), dtype=torch.float64), 0
    log_law = read.logits.log_softmax(-1)
    for i in range(len(episodes)):
        n, score = int(episodes.lengths[i]), tree.scores.flatten()[i].item()
        tokens, at = episodes.response_ids[i, :n], torch.arange(place, place + n)
        values = read.values[at]
        q = values + price * (log_law[at, tokens] - episodes.ref_log_probs[i, :n])
        for t in range(n):
            target = q[t].item()
            for k in range(t, n):
                behind = score if k == n - 1 else gamma * values[k + 1].item()
                target += (gamma * decay) ** (k - t) * (behind - q[k].item())
            total = total + probs[i] * 0.5 * (q[t] - target).square()
        place += n
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
    (loss, found), (expected, right) = q_gradient(agent, tree), slow_q_gradient(agent, tree)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert right.norm() > 0.01


def test_the_value_of_klq_is_the_soft_value_of_its_q() -> None:
    """V(s) = kl_coef log sum_a pi_ref(a|s) exp(Q(s, a) / kl_coef) for any policy and critic."""
    tree = Tree.of(TinyProblem().task, "train")
    agent, price = tabular(tree, moved=0.5), tree.task.kl_coef
    read = agent.policy.read(tree.episodes)
    ref = law_of(tree.task.reference("cpu"))(tree.episodes).double().log_softmax(-1)
    q = read.values.unsqueeze(1) + price * (read.logits.log_softmax(-1) - ref)
    torch.testing.assert_close(price * (ref + q / price).logsumexp(1), read.values, rtol=0, atol=1e-9)
