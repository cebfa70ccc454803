"""Where the gap V* - J comes from: its parts add up, and each is what writing everything down says it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TinyProblem, shifted
from torch import Tensor

import lmgym
from agents.algorithms.uniform import UniformPolicy
from lmgym.automata import from_regex, positions
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.models.tables import markov_lm
from lmgym.optimum.anatomy import (
    CriticError,
    GapAnatomy,
    GradientQuality,
    critic_targets,
    dissect_automaton,
    dissect_episodes,
    dissect_exactly,
    dissect_tree,
    gaps_of_episodes,
    soft_values,
    solve_for_tokens,
    visits,
)
from lmgym.optimum.tree import Tree, TreePolicy, make_episode_logits, solve_tree
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task

ROWS = np.array([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.5, 0.1, 0.4]])
OTHER = np.array([[0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.3, 0.3, 0.4]])


def table_task(**changes: Any) -> Task:
    numbers = {"kl_coef": 0.3, "max_new_tokens": 4, **changes}
    reward = AutomatonReward(from_regex("( a | b )* a b", {"a": 1, "b": 2}, vocab_size=3))
    prompts = {"test": ["a", "b"]}
    return Task(name="table", **{"model": markov_lm(ROWS, ["a", "b"]), "reward": reward, "prompts": prompts, **numbers})


def other_table() -> CausalPolicy:
    return CausalPolicy(markov_lm(OTHER, ["a", "b"]))


def by_tree(policy: Any, task: Task, **arguments: Any) -> GapAnatomy:
    return dissect_tree(Tree.of(task, "test"), make_episode_logits(policy), **arguments)


def total(parts: Sequence[Any]) -> float:
    return sum(part.mean for part in parts)


# -- all responses written down --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> TinyProblem:
    problem = TinyProblem(prompts={"test": ["x", "y z", "z z x"]})
    return problem


@pytest.fixture(scope="module")
def tiny_anatomy(tiny: TinyProblem) -> GapAnatomy:
    return by_tree(CausalPolicy(tiny.other), tiny.task, most=10**6)


def prefix_kl(tiny: TinyProblem, log_probs: Tensor, optimal: Tensor, t: int) -> float:
    """KL of the distributions of the first t tokens, from (R,) log-probs of whole responses."""
    masses: dict[tuple[int, ...], list[float]] = {}
    for response, own, best in zip(tiny.responses, log_probs.exp().tolist(), optimal.exp().tolist(), strict=True):
        sums = masses.setdefault(response[:t], [0.0, 0.0])
        sums[0] += own
        sums[1] += best
    return sum(own * np.log(own / best) for own, best in masses.values())


def test_the_parts_add_up_and_are_those_of_the_chain_rule(tiny: TinyProblem, tiny_anatomy: GapAnatomy) -> None:
    found = tiny_anatomy
    for prompt, shares in zip(tiny.prompts, found.by_prompt, strict=True):
        log_probs = tiny.token_log_probs(tiny.other, prompt).sum(1)
        value, optimal = tiny.optimum(prompt)
        assert sum(shares) == pytest.approx(value - tiny.objective(prompt, log_probs), abs=1e-6)
        for t, share in enumerate(shares):
            steps = prefix_kl(tiny, log_probs, optimal, t + 1) - prefix_kl(tiny, log_probs, optimal, t)
            assert share == pytest.approx(tiny.kl_coef * steps, abs=1e-6)
    assert found.gap.exact
    assert found.gap.mean > 0.01
    assert found.optimum - found.value == pytest.approx(found.gap.mean)
    for parts in (found.by_step, [state.share for state in found.states]):
        assert total(parts) == pytest.approx(found.gap.mean, abs=1e-9)


def test_a_share_is_visits_times_kl(tiny: TinyProblem, tiny_anatomy: GapAnatomy) -> None:
    shares = [state.share.mean for state in tiny_anatomy.states]
    assert shares == sorted(shares, reverse=True)
    for state in tiny_anatomy.states:
        assert state.share.mean == pytest.approx(tiny.kl_coef * state.visits * state.kl)
        assert state.too_likely.probability > state.too_likely.optimal
        assert state.too_unlikely.probability < state.too_unlikely.optimal
    by_step = [sum(s.visits for s in tiny_anatomy.states if s.step == t) for t in range(tiny.T)]
    assert by_step == pytest.approx(tiny_anatomy.running)
    roots = {state.prompt: state for state in tiny_anatomy.states if state.step == 0}
    assert {root.visits for root in roots.values()} == {1 / 3}
    assert roots.keys() == set(tiny.prompts)


def test_entropies_of_the_steps_are_those_of_the_responses(tiny: TinyProblem, tiny_anatomy: GapAnatomy) -> None:
    own = [
        float(tiny.token_log_probs(tiny.other, p).sum(1).exp() @ -tiny.token_log_probs(tiny.other, p).sum(1))
        for p in tiny.prompts
    ]
    sums = sum(r * e for r, e in zip(tiny_anatomy.running, tiny_anatomy.entropy, strict=True))
    assert sums == pytest.approx(np.mean(own), abs=1e-6)
    of_optimum = by_tree(solve_tree(tiny.task, "test").policy, tiny.task)
    best = [float(tiny.optimum(p)[1].exp() @ -tiny.optimum(p)[1]) for p in tiny.prompts]
    sums = sum(r * e for r, e in zip(of_optimum.running, of_optimum.optimal_entropy, strict=True))
    assert sums == pytest.approx(np.mean(best), abs=1e-6)
    assert of_optimum.entropy == pytest.approx(of_optimum.optimal_entropy)


def test_masses_of_responses(tiny: TinyProblem, tiny_anatomy: GapAnatomy) -> None:
    best = []
    lost = []
    overconfident = []
    for prompt in tiny.prompts:
        own = tiny.token_log_probs(tiny.other, prompt).sum(1).exp()
        reference = tiny.token_log_probs(tiny.lm, prompt).sum(1).exp()
        optimal = tiny.optimum(prompt)[1].exp()
        best.append(own[tiny.scores(prompt).argmax()].item())
        missing = (optimal - own).clamp(min=0)
        lost.append(missing.sum().item())
        overconfident.append(missing[own < reference].sum().item())
    masses = tiny_anatomy.masses
    assert masses.best == pytest.approx(np.mean(best), abs=1e-6)
    assert masses.lost == pytest.approx(np.mean(lost), abs=1e-6)
    assert masses.overconfident == pytest.approx(np.mean(overconfident), abs=1e-6)
    assert masses.overconfident + masses.underexplored == pytest.approx(masses.lost)
    assert masses.optimal_best > masses.reference_best


def test_a_policy_made_wrong_at_one_state_shows_that_state() -> None:
    task = table_task()
    tree = Tree.of(task, "test")
    levels = tree.solve_levels()
    wrong = [level.clone() for level in levels.log_probs]
    wrong[2][1, 3] = torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64).log()  # prompt 1, after its fourth prefix
    policy = TreePolicy(tree.responses, wrong, levels.values)
    found = by_tree(policy, task)
    (state,) = found.states
    assert state.prompt == "b"
    assert state.response == task.reference("cpu").completions([[2]], [tree.responses.prefix(2, 3)])[0]
    assert state.step == 2
    assert tree.responses.prefix(2, 3) == [2, 2]
    assert state.share.mean == pytest.approx(found.gap.mean, abs=1e-12)
    assert state.too_likely.token.strip() == "a"
    assert state.too_likely.probability == pytest.approx(0.8)
    assert [part.mean > 1e-12 for part in found.by_step] == [False, False, True, False]
    assert tree.solve().value - tree.evaluate(make_episode_logits(policy)).value == pytest.approx(found.gap.mean)


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.7},
        {"gamma": 0.0},
        {"dense_kl": False},
        {"missing_eos_penalty": 0.5},
        {"min_new_tokens": 2},
        {"max_new_tokens": 1},
    ],
)
def test_the_parts_add_up_to_the_gap_of_any_task(changes: dict[str, Any]) -> None:
    task = table_task(**changes)
    tree = Tree.of(task, "test")
    for sampler in (Sampler(), Sampler(temperature=0.5), Sampler(top_k=1)):
        found = dissect_exactly(other_table(), task, sampler=sampler)
        assert found is not None
        assert found.method == "tree"
        assert total(found.by_step) == pytest.approx(found.gap.mean, abs=1e-6)
        assert found.gap.mean > 1e-3
    plain = tree.evaluate(make_episode_logits(other_table()))
    assert found.optimum == pytest.approx(tree.solve().value)
    assert by_tree(other_table(), task).value == pytest.approx(plain.value, abs=1e-9)


def test_a_late_kl_has_no_parts() -> None:
    with pytest.raises(InvalidArgumentError, match="`gamma` must be 1 where `dense_kl` is False for the gap"):
        dissect_exactly(other_table(), table_task(gamma=0.7, dense_kl=False))
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        dissect_exactly(other_table(), table_task(kl_coef=0.0))


def test_soft_values_are_the_mean_returns_of_what_goes_on(tiny: TinyProblem) -> None:
    for dense_kl in (True, False):
        task = replace(tiny.task, dense_kl=dense_kl)
        tree = Tree.of(task, "test")
        own = tree.responses.read(make_episode_logits(tiny.other))
        values = critic_targets(tree, own)
        reach = visits(tree.responses, own)
        for x, prompt in enumerate(tiny.prompts):
            tokens = tiny.token_log_probs(tiny.other, prompt)
            ratio = tokens - tiny.token_log_probs(tiny.lm, prompt)
            for t, node in ((0, 0), (1, 2), (2, 7)):
                prefix = tuple(tree.responses.prefix(t, node))
                rows = [i for i, response in enumerate(tiny.responses) if response[:t] == prefix]
                assert all(len(tiny.responses[i]) > t for i in rows)
                paid = ratio[rows, t:].sum(1) if dense_kl else ratio[rows].sum(1)
                probs = tokens[rows].sum(1).exp()
                returns = tiny.scores(prompt)[rows] - tiny.kl_coef * paid
                assert reach[t][x, node].item() == pytest.approx(probs.sum().item(), abs=1e-6)
                assert values[t][x, node].item() == pytest.approx(float(probs @ returns / probs.sum()), abs=1e-5)


def test_advantages_have_mean_0_and_follow_the_values(tiny: TinyProblem) -> None:
    tree = Tree.of(tiny.task, "test")
    own = tree.responses.read(make_episode_logits(tiny.other))
    values, advantages = soft_values(tree, own)
    for p, advantage in zip(own, advantages, strict=True):
        assert (p.exp() * advantage).sum(-1).abs().max() < 1e-12
    level = tree.responses.levels[0]
    q = values[1].view(len(tiny.prompts), 1, -1)
    ratio = (own[0] - tree.reference[0])[..., level.going]
    expected = q - tiny.kl_coef * ratio - values[0].unsqueeze(-1)
    assert torch.allclose(advantages[0][..., level.going], expected)
    none = soft_values(tree, tree.solve_levels().log_probs)
    assert max(advantage.abs().max().item() for advantage in none.advantages) < 1e-9  # nothing is better than pi*


# -- what keeps a policy from getting better -------------------------------------------------------------------------


def test_the_error_of_a_critic() -> None:
    values = [torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0, 2.0], [5.0, 5.0]])]
    visits_of = [torch.ones(2, 1), torch.tensor([[0.5, 0.0], [0.0, 0.0]])]
    higher = [value + 0.5 for value in values]
    error = CriticError.of(higher, values, visits_of)
    assert (error.rmse, error.bias, error.explained_variance) == pytest.approx((0.5, 0.5, 1.0))
    assert error.rmse_by_step == pytest.approx([0.5, 0.5])
    truth = np.array([1.0, 3.0, 0.0])
    weights = np.array([0.4, 0.4, 0.2])
    spread = np.sqrt(weights @ (truth - weights @ truth) ** 2)
    zeros = CriticError.of([torch.zeros_like(value) for value in values], values, visits_of)
    assert zeros.spread == pytest.approx(spread)
    assert zeros.explained_variance == pytest.approx(0, abs=1e-6)
    never = CriticError.of(higher, values, [torch.ones(2, 1), torch.zeros(2, 2)])
    assert never.rmse_by_step[1] is None


def test_the_critic_reads_every_prefix(tiny: TinyProblem) -> None:
    """V* as `TreePolicy` steps it along, read back at the prefixes that it was written down for."""
    tree = Tree.of(tiny.task, "test")
    values = tree.solve_levels().values
    policy = tree.solve().policy

    def step_values(episodes: Any) -> Tensor:
        state = policy.begin(episodes.prompt_ids, episodes.prompt_mask, tiny.T)
        columns = [state.values]
        for t in range(tiny.T - 1):
            state.step(episodes.response_ids[:, t])
            columns.append(state.values)
        return torch.stack(columns, 1)

    for found, expected in zip(tree.responses.read_values(step_values), values, strict=True):
        assert torch.equal(found, expected)


def test_the_quality_of_an_estimator() -> None:
    """(1, 0) or (3, 4), each half the time, for the gradient (2, 0)."""
    estimates = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    quality = GradientQuality.of(torch.tensor([0.5, 0.5]), estimates, torch.tensor([2.0, 0.0]))
    assert quality.bias == pytest.approx(2 / 2)
    assert quality.cosine == pytest.approx(0.5**0.5)
    assert quality.variance == pytest.approx((1 + 4) / 4)


def test_the_quality_of_an_estimator_from_samples() -> None:
    """Noise of ten times the mean's length hides the cosine from the mean of the samples, and not from this."""
    generator = torch.Generator().manual_seed(shifted())
    gradient = torch.zeros(500, dtype=torch.float64)
    gradient[0] = 2.0
    mean = torch.zeros_like(gradient)
    mean[:2] = torch.tensor([3.0, 4.0])  # of length 5, at a cosine of 0.6
    noise = 50 / 500**0.5 * torch.randn((400, 500), generator=generator, dtype=torch.float64)
    estimates = mean + noise
    naive = torch.cosine_similarity(estimates.mean(0), gradient, dim=0).item()
    found = GradientQuality.of_samples(estimates, gradient)
    assert abs(found.cosine - 0.6) < 4 * found.cosine_error < 0.4
    assert naive < 0.6 - found.cosine_error
    assert found.norm == pytest.approx(2.5, rel=0.2)
    assert found.variance == pytest.approx(50**2 / 2**2, rel=0.1)
    assert found.bias == pytest.approx(17**0.5 / 2, rel=0.25)


def test_samples_and_probabilities_agree() -> None:
    estimates = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    gradient = torch.tensor([2.0, 0.0], dtype=torch.float64)
    exact = GradientQuality.of(torch.tensor([0.5, 0.5], dtype=torch.float64), estimates, gradient)
    many = GradientQuality.of_samples(estimates.repeat(5000, 1), gradient)
    for name in ("bias", "norm", "cosine", "variance"):
        assert getattr(many, name) == pytest.approx(getattr(exact, name), rel=1e-3), name


# -- an automaton ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gamma": 0.7},
        {"missing_eos_penalty": 0.5},
        {"reward": AutomatonReward(lambda ids: positions(ids, 3))},
        {"model": markov_lm(np.tile(ROWS[0], (1, 1)), ["a", "b"], order=0)},
    ],
)
def test_tables_and_enumeration_agree(changes: dict[str, Any]) -> None:
    task = table_task(**changes)
    lm = task.reference("cpu")
    dearer = lmgym.solve(replace(task, kl_coef=1.0, optima={})).policy
    others = [other_table()] if "model" not in changes else []
    for policy in (CausalPolicy(lm), UniformPolicy(lm), dearer, *others):
        states = dissect_automaton(policy, task, "test", most=10**6)
        assert states is not None
        texts = by_tree(policy, task)
        for name in ("optimum", "value", "running", "entropy", "optimal_entropy"):
            assert getattr(states, name) == pytest.approx(getattr(texts, name), abs=1e-6), name
        assert np.array(states.by_prompt) == pytest.approx(np.array(texts.by_prompt), abs=1e-6)
        assert total([state.share for state in states.states]) == pytest.approx(texts.gap.mean, abs=1e-6)
        if task.gamma == 1 and "reward" not in changes:
            for name in ("best", "optimal_best", "reference_best"):
                assert getattr(states.masses, name) == pytest.approx(getattr(texts.masses, name), abs=1e-6), name
        else:  # which pays on the way, or late
            assert states.masses.best is None


def test_a_policy_that_depends_on_more_than_the_state_is_none_of_a_table() -> None:
    class Opaque:
        device = torch.device("cpu")

    assert dissect_automaton(Opaque(), table_task(), "test") is None


# -- samples ---------------------------------------------------------------------------------------------------------


def sampled(policy: Any, task: Task, samples: int, sampler: Sampler | None = None) -> GapAnatomy:
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
    prompts = [envs.engine.prompts[i] for i in range(len(task.prompts["test"])) for _ in range(samples)]
    episodes = lmgym.collect(envs, policy, prompts, sampler, torch.Generator().manual_seed(0))
    return dissect_episodes(episodes, policy, solve_for_tokens(task), task, sampler=sampler)


@pytest.mark.parametrize("changes", [{}, {"gamma": 0.7}])
def test_samples_agree_with_enumeration(changes: dict[str, Any]) -> None:
    task = table_task(**changes)
    policy = other_table()
    found = sampled(policy, task, 1000)
    exact = by_tree(policy, task)
    assert found.method == "samples"
    assert found.gap.low < exact.gap.mean < found.gap.high
    assert found.gap.high - found.gap.low < 0.2 * exact.gap.mean
    assert total(found.by_step) == pytest.approx(found.gap.mean)
    for few, all_of_it in zip(found.by_step, exact.by_step, strict=True):
        half = max(few.high - few.mean, 1e-6)
        assert abs(few.mean - all_of_it.mean) < 2 * half
    assert found.running == pytest.approx(exact.running, abs=0.05)
    assert found.entropy == pytest.approx(exact.entropy, abs=0.05)
    assert found.masses.lost == pytest.approx(exact.masses.lost, abs=0.05)
    states = dissect_automaton(policy, task, "test", most=3)
    assert states is not None
    for few, all_of_it in zip(found.states, states.states, strict=False):
        assert (few.step, few.response, few.automaton_state) == (
            all_of_it.step,
            all_of_it.response,
            all_of_it.automaton_state,
        )
        assert few.kl == pytest.approx(all_of_it.kl)
        assert few.too_likely.token == all_of_it.too_likely.token
        assert few.too_likely.probability == pytest.approx(all_of_it.too_likely.probability, abs=1e-6)
    if task.gamma == 1:
        assert found.masses.best == pytest.approx(exact.masses.best, abs=0.05)
        assert found.masses.optimal_best == pytest.approx(exact.masses.optimal_best, abs=1e-6)


def test_the_optimum_has_no_gap() -> None:
    task = table_task()
    found = sampled(lmgym.solve(task).policy, task, 8)
    assert found.gap.mean == pytest.approx(0, abs=1e-12)
    assert not [state for state in found.states if state.share.mean > 1e-9]


class Copy:
    """Accepts the response that repeats the prompt's first token and ends."""

    def accepted_responses(self, prompt_ids: Sequence[int]) -> list[tuple[int, ...]]:
        return [(prompt_ids[0], 1)]

    def __call__(
        self, prompts: Any, completions: Any, *, prompt_ids: Any, completion_ids: Any, **_: Any
    ) -> list[float]:
        return [float([p[0], 1] == list(y)) for p, y in zip(prompt_ids, completion_ids, strict=True)]


def test_a_verifiable_task_from_samples() -> None:
    tiny = TinyProblem(prompts={"test": ["x", "y z"]}, reward=Copy())
    policy = CausalPolicy(tiny.other)
    found = sampled(policy, tiny.task, 500)
    exact = by_tree(policy, tiny.task)
    assert found.gap.low < exact.gap.mean < found.gap.high
    for name in ("optimal_best", "reference_best"):
        assert getattr(found.masses, name) == pytest.approx(getattr(exact.masses, name), abs=1e-6)
    first = found.states[0]
    (twin,) = [s for s in exact.states if (s.prompt, s.response, s.step) == (first.prompt, first.response, first.step)]
    assert first.kl == pytest.approx(twin.kl, abs=1e-6)
    assert first.automaton_state is None


def test_shares_of_tokens_count_the_chosen_ones_alone() -> None:
    task = table_task()
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
    policy = other_table()
    sampler = Sampler(temperature=0.7)
    episodes = lmgym.collect(envs, policy, 8, sampler, torch.Generator().manual_seed(1))
    gaps = gaps_of_episodes(episodes, policy, lmgym.solve(task).policy, task, sampler)
    assert torch.allclose(gaps.log_probs.float(), episodes.log_probs, atol=1e-5)
    assert not gaps.shares[~episodes.response_mask].any()
    assert bool((gaps.shares[episodes.response_mask] >= 0).all())


def test_what_cannot_be_taken_apart_is_refused() -> None:
    tiny = TinyProblem(prompts={"test": ["x"]})
    with pytest.raises(InvalidArgumentError, match="pi\\* is not known token by token"):
        solve_for_tokens(tiny.task, limit=10)
    assert dissect_exactly(CausalPolicy(tiny.other), tiny.task, limit=10) is None
    task = table_task()
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
    odd = lmgym.collect(envs, other_table(), [envs.engine.prompts[0]] * 4)
    with pytest.raises(InvalidArgumentError, match="`episodes` must be of the 2 prompts of the optimum"):
        dissect_episodes(odd, other_table(), solve_for_tokens(task), task)
