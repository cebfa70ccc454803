"""The closed form of rewards that are 1 for a known set of responses, held to enumeration and to the env."""

from __future__ import annotations

import math
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TinyProblem, table_reward

from lmgym.errors import InvalidArgumentError
from lmgym.kl import discounted_return, episode_kl, token_rewards
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.solve import solve
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.optimum.verifiable import log_exp_reward, prefix_table, solve_verifiable
from lmgym.rewards.noise import NoisyReward
from lmgym.rollout import collect, collect_steps
from lmgym.tasks import Task

Response = tuple[int, ...]


class Accepts:
    """1 for some responses to each prompt, by the number of its tokens."""

    def __init__(self, responses: Sequence[Sequence[Response]]) -> None:
        self.responses = responses
        self.asked = 0

    def accepted_responses(self, prompt_ids: Sequence[int]) -> list[Response]:
        self.asked += 1
        return list(self.responses[(len(prompt_ids) - 1) % len(self.responses)])

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        **columns: object,
    ) -> list[float]:
        pairs = zip(prompt_ids, completion_ids, strict=True)
        return [float(tuple(y) in self.responses[(len(x) - 1) % len(self.responses)]) for x, y in pairs]


def problem(seed: int = 0, share: float = 0.1, **changes: object) -> TinyProblem:
    """A GPT-2 over 6 tokens with three of them in a response at most; each prompt accepts others (the second: none)."""
    rng = np.random.default_rng(seed)
    every = TinyProblem(horizon=3).responses
    kinds = [[y for y in every if rng.random() < share], [], [every[int(rng.integers(len(every)))]]]
    changes = {"reward": Accepts(kinds), **changes}
    return TinyProblem(horizon=3, **changes)


@pytest.mark.parametrize("kl_coef", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_that_of_all_responses(seed: int, kl_coef: float) -> None:
    task = problem(seed, kl_coef=kl_coef).task
    optimum = solve_verifiable(task, "train")
    tree = Tree.of(task, "train")
    enumerated = tree.solve()
    assert optimum.exact
    assert optimum.lower == optimum.upper == optimum.value
    torch.testing.assert_close(optimum.values, enumerated.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(optimum.references, enumerated.references, rtol=0, atol=1e-5)
    assert optimum.policy is not None
    earned = tree.evaluate(make_episode_logits(optimum.policy))
    torch.testing.assert_close(earned.returns, enumerated.values, rtol=0, atol=1e-5)
    assert optimum.values[1] == 0
    assert earned.kl[1].abs() < 1e-6  # with nothing to reach, pi* is the reference
    gain = optimum.references * (math.exp(1 / kl_coef) - 1)
    torch.testing.assert_close(optimum.values, kl_coef * (1 + gain).log(), rtol=1e-5, atol=1e-9)


def test_min_new_tokens_and_a_late_kl() -> None:
    """An EOS among the first tokens does not end; at gamma = 1 it does not matter when the KL is paid."""
    accepted = [[(1, 3, 1), (4, 1, 5)]]
    task = problem(reward=Accepts(accepted), min_new_tokens=2, dense_kl=False).task
    optimum = solve_verifiable(task, "train")
    torch.testing.assert_close(optimum.values, Tree.of(task, "train").solve().values, rtol=0, atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="must end where the episode does, after token 0"):
        solve_verifiable(problem(reward=Accepts(accepted)).task, "train")


def test_the_policy_and_its_values_are_those_of_the_tree() -> None:
    """Step by step, with rows that leave and rows that start again, and after the end."""
    tiny = problem(1, share=0.2)
    optimum = solve_verifiable(tiny.task, "train")
    enumerated = Tree.of(tiny.task, "train").solve()
    assert optimum.policy is not None
    assert enumerated.policy is not None
    lists = tiny.lm.encode_all(tuple(tiny.prompts))
    width = max(len(ids) for ids in lists)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in lists])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in lists])
    states = [p.begin(ids, mask, 3) for p in (optimum.policy, enumerated.policy)]
    generator = torch.Generator().manual_seed(0)
    position = torch.zeros(3, dtype=torch.int64)
    compared = 0
    for step in range(8):
        mine, theirs = states
        distributions = mine.logits.exp()
        assert distributions.sum(-1).tolist() == pytest.approx([1.0] * 3)
        alive = position < 3
        torch.testing.assert_close(distributions[alive], theirs.logits[alive].exp(), rtol=0, atol=1e-5)
        torch.testing.assert_close(mine.values[alive], theirs.values[alive], rtol=0, atol=1e-5)
        compared += int(alive.sum())
        likely = mine.logits.clone()
        likely[:, 1] = -torch.inf  # no EOS: three tokens each
        tokens = torch.multinomial(likely.exp(), 1, generator=generator).squeeze(1)
        for state in states:
            state.step(tokens)
        position += 1
        if step in (1, 4):
            kept = torch.tensor([2, 0, 1])
            fresh = torch.tensor([1])
            for state in states:
                state.keep(kept)
                state.begin(fresh, ids[:1], mask[:1])
            position = position[kept]
            position[1] = 0
    assert compared == 14


@pytest.mark.parametrize("kl_coef", [0.1, 1.0])
def test_every_episode_of_the_optimum_earns_the_same_in_the_env(kl_coef: float) -> None:
    task = problem(2, share=0.2, kl_coef=kl_coef).task
    optimum = solve_verifiable(task, "train")
    assert optimum.policy is not None
    envs = gym.make_vec("lmgym/RLHF-v0", num_envs=3, task=task, autoreset_mode="SameStep")
    prompts = [envs.engine.prompts[i] for i in range(3) for _ in range(300)]
    episodes = collect(envs, optimum.policy, prompts, generator=torch.Generator().manual_seed(0))
    exact = episodes.scores - kl_coef * episode_kl(episodes)
    torch.testing.assert_close(exact.double(), optimum.values.repeat_interleave(300), rtol=0, atol=1e-4)
    rate = episodes.scores.view(3, 300).mean(1).double()
    expected = optimum.references * ((1 - optimum.values) / kl_coef).exp()
    assert ((rate - expected).abs() <= 4 * (expected * (1 - expected) / 300).sqrt() + 1e-6).all()
    togo = token_rewards(episodes, kl_coef).flip(1).cumsum(1).flip(1)
    kept = episodes.response_mask
    assert episodes.values is not None
    torch.testing.assert_close(togo[kept], episodes.values[kept], rtol=0, atol=1e-4)
    envs.reset(seed=0)
    stepped = collect_steps(envs, optimum.policy, 9, generator=torch.Generator().manual_seed(0))
    returns = discounted_return(token_rewards(stepped, kl_coef), 1.0).double()
    assert ((returns[:, None] - optimum.values).abs().amin(1) < 1e-4).all()


# --- scale ---------------------------------------------------------------------------------------------------------


def test_small_probabilities_and_small_prices() -> None:
    """p = 1e-200 and exp(1 / b) = exp(1000): neither fits beside the other, and V* is 1 + b log p where it is large."""
    log_p = math.log(10) * torch.tensor([-200.0, -300.0, -600.0, -0.0], dtype=torch.float64)
    values = 0.001 * log_exp_reward(log_p, 0.001)
    torch.testing.assert_close(values[[0, 1]], 1 + 0.001 * log_p[[0, 1]], rtol=1e-12, atol=0)
    assert 0 <= values[2] < 1e-6
    assert values[3] == pytest.approx(1)
    none = log_exp_reward(torch.tensor([-torch.inf], dtype=torch.float64), 0.001)
    assert none.item() == 0
    # At a large price V* is the mean score, p: no digit may be lost in 1 + p (exp(1 / b) - 1).
    log_p = torch.tensor([math.log(1e-9)], dtype=torch.float64)
    assert (1e6 * log_exp_reward(log_p, 1e6)).item() == pytest.approx(1e-9, rel=1e-6)
    for p, b in ((0.3, 0.5), (1e-4, 0.05), (0.9, 20.0)):
        found = log_exp_reward(torch.tensor(math.log(p), dtype=torch.float64), b)
        assert found.item() == pytest.approx(math.log(1 + p * (math.exp(1 / b) - 1)), rel=1e-12)


def test_one_long_response_among_many() -> None:
    """60 tokens of probability 1e-6 each: p underflows, and pi* still finds the way."""
    target = tuple(1 + i % 2 for i in range(60))
    rows = np.full((3, 3), 1e-6)
    rows[:, 0] = 1 - 2e-6
    reward = Accepts([[target]])
    fields = {"name": "long", "model": markov_lm(rows, ["a", "b"]), "reward": reward, "prompts": {"test": ["a b"]}}
    task = Task(**fields, kl_coef=1e-4, max_new_tokens=60)
    optimum = solve_verifiable(task)
    assert optimum.value == pytest.approx(1 + 1e-4 * 60 * math.log(1e-6), rel=1e-6)
    assert optimum.references.item() == 0  # underflows
    envs = gym.make_vec("lmgym/RLHF-v0", num_envs=1, task=task, split="test", autoreset_mode="SameStep")
    episodes = collect(envs, optimum.policy, 5, generator=torch.Generator().manual_seed(0))
    assert (episodes.scores == 1).all()
    exact = episodes.scores - 1e-4 * episode_kl(episodes)
    torch.testing.assert_close(exact, torch.full((5,), optimum.value), rtol=0, atol=1e-4)


def test_a_prefix_knows_how_likely_its_ends_are() -> None:
    log_probs = torch.tensor([[0.5, 0.2, 0.0], [0.5, 0.3, 0.1], [0.25, 0.0, 0.0]], dtype=torch.float64)
    log_probs = torch.where(log_probs > 0, log_probs.clamp(min=1e-9).log(), 0.0)
    root = prefix_table([(4, 2), (4, 3, 2), (2,)], log_probs)
    assert root.log_prob == pytest.approx(math.log(0.5 * 0.2 + 0.5 * 0.3 * 0.1 + 0.25))
    assert root.next.keys() == {2, 4}
    assert root.next[4].log_prob == pytest.approx(math.log(0.2 + 0.3 * 0.1))
    assert root.next[4].next[3].log_prob == pytest.approx(math.log(0.1))
    assert root.next[4].next[2].log_prob == root.next[2].log_prob == 0


# --- the rest of the interface -------------------------------------------------------------------------------------


def test_each_prompt_is_asked_about_once_and_doubles_count_once() -> None:
    reward = Accepts([[(2, 1), (3, 1)]])
    optimum = solve_verifiable(problem(reward=reward).task, "train")
    assert reward.asked == 3
    twice = solve_verifiable(problem(reward=Accepts([[(2, 1), (3, 1), (2, 1)]])).task, "train")
    torch.testing.assert_close(twice.values, optimum.values)
    noisy = solve_verifiable(problem(reward=NoisyReward(reward, 2.0)).task, "train")
    torch.testing.assert_close(noisy.values, optimum.values)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((2, 3), "`accepted_responses` must be whole: 3 tokens, or an EOS as the last one from token 0 on"),
        ((), "`accepted_responses` must be whole"),
        ((2, 3, 4, 1), "must end where the episode does, after token 2"),
        ((1, 2, 3), "must end where the episode does, after token 0"),
        ((2, 9, 1), "`accepted_responses` must hold token ids, and 9 is none"),
    ],
)
def test_a_response_that_no_episode_can_be_is_refused(response: Response, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        solve_verifiable(problem(reward=Accepts([[response]])).task, "train")


@pytest.mark.parametrize("change", [{"missing_eos_penalty": 0.5}, {"gamma": 0.9}])
def test_what_the_closed_form_does_not_hold_for_is_enumerated(change: dict[str, float]) -> None:
    assert solve(problem().task, split="train").method == "verifiable"
    task = problem(**change).task
    found = solve(task, split="train")
    assert found.method == "tree"
    torch.testing.assert_close(found.values, Tree.of(task, "train").solve().values)


def test_what_the_closed_form_does_not_hold_for_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`gamma` must be 1 for the closed form, got 0.9."):
        solve_verifiable(problem(gamma=0.9).task, "train")
    with pytest.raises(InvalidArgumentError, match="`missing_eos_penalty` must be 0 for the closed form, got 0.5."):
        solve_verifiable(problem(missing_eos_penalty=0.5).task, "train")
    with pytest.raises(InvalidArgumentError, match="`reward` must have a method accepted_responses"):
        solve_verifiable(TinyProblem(reward=table_reward).task, "train")
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        solve_verifiable(problem(kl_coef=0.0).task, "train")


def test_a_table_as_the_reference() -> None:
    rng = np.random.default_rng(0)
    model = markov_lm(dirichlet_rows(rng, 16, 4, 1.0), ["a", "b", "c"], order=2)
    reward = Accepts([[(1, 2, 0), (3, 3, 3, 3)], [(0,)]])
    prompts = {"test": ["a", "b c"]}
    task = Task(name="table", model=model, reward=reward, prompts=prompts, kl_coef=0.2, max_new_tokens=4)
    enumerated = Tree.of(task).solve()
    torch.testing.assert_close(solve_verifiable(task).values, enumerated.values, rtol=0, atol=1e-5)
