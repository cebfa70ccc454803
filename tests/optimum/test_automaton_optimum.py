"""Dynamic programming over (step, context, automaton state), held to enumeration, to closed forms and to the env."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TinyProblem, gpt2, word_tokenizer
from torch import Tensor

from lmgym.automata import Automaton
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import discounted_return, episode_kl, token_rewards
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.markov import MarkovLM
from lmgym.models.tables import dirichlet_rows, markov_lm, symbol_tokenizer
from lmgym.optimum.answer import Optimum
from lmgym.optimum.automaton import AutomatonPolicy, AutomatonSolution, ReferenceTable, solve_automaton
from lmgym.optimum.automaton.logspace import log_matmul
from lmgym.optimum.solve import best_response, solve
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.rewards.automaton import AutomatonReward
from lmgym.rewards.noise import NoisyReward
from lmgym.rollout import collect, collect_steps
from lmgym.tasks import Task

SEEDS = range(24)


def random_task(seed: int, **changes: object) -> Task:
    """A small task; order, gamma and the form of the reward go round with the seed, the rest is drawn."""
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.integers(3, 7))
    states = int(rng.integers(2, 6))
    horizon = int(rng.integers(2, 5))
    order = seed % 3
    gamma = (1.0, 0.95, 0.5)[seed // 3 % 3]
    horizon = min(horizon, 3) if vocab_size == 6 else horizon
    late = bool(rng.integers(2))
    paid = rng.normal(size=(states, vocab_size)) if gamma == 1 or late else None

    def automaton(prompt_ids: tuple[int, ...] = ()) -> Automaton:
        own = np.random.default_rng([seed, *prompt_ids])
        payments = own.normal(size=states)
        initial = int(own.integers(states))
        return Automaton.dense(own.integers(0, states, (states, vocab_size)), payments, paid, initial)

    symbols = [f"s{i}" for i in range(1, vocab_size)]
    fields: dict[str, object] = {
        "name": "random",
        "model": markov_lm(dirichlet_rows(rng, vocab_size**order, vocab_size, 0.7), symbols, order=order),
        "reward": AutomatonReward(automaton() if seed % 2 else automaton),
        "prompts": {"test": [" ".join(rng.choice(symbols, n)) for n in (1, 2, 3)]},
        "kl_coef": (0.05, 0.3, 2.0)[rng.integers(3)],
        "max_new_tokens": horizon,
        "gamma": gamma,
        "min_new_tokens": int(rng.integers(horizon)),
        "missing_eos_penalty": (0.0, 0.7)[rng.integers(2)],
        "dense_kl": not late,
    }
    return Task(**{**fields, **changes})


@cache
def solved(seed: int) -> tuple[Task, Optimum, Tree]:
    task = random_task(seed)
    return task, solve_automaton(task), Tree.of(task)


def prompts_of(task: Task) -> list[list[int]]:
    return task.reference().encode_all(tuple(task.prompts["test"]))


def table_of(task: Task) -> list[list[float]]:
    """pi_ref(a | c), rows by context."""
    model = task.reference().model
    table = model.rows.double() if model.mixture is None else model.mixture.double() @ model.rows.double()
    return (table / table.sum(1, keepdim=True)).tolist()


def responses_of(task: Task, vocab_size: int) -> Iterator[tuple[int, ...]]:
    """Every response there is, by trying all strings of all lengths."""
    for n in range(1, task.max_new_tokens + 1):
        for y in itertools.product(range(vocab_size), repeat=n):
            ends = [a == 0 and t >= task.min_new_tokens for t, a in enumerate(y)]
            if not any(ends[:-1]) and (ends[-1] or n == task.max_new_tokens):
                yield y


def context_of(ids: list[int], order: int, vocab_size: int) -> int:
    ids = [0, 0, *ids]
    return (0, ids[-1], ids[-2] * vocab_size + ids[-1])[order]


def by_hand(task: Task, prompt: list[int]) -> tuple[float, float]:
    """V*(x) and J(pi_ref | x), from all responses in plain Python."""
    model = task.reference().model
    b = task.kl_coef
    reward = task.reward_function()
    table = table_of(task)
    size = model.config.vocab_size
    order = model.config.order
    probability: dict[tuple[int, ...], float] = {}
    score: dict[tuple[int, ...], float] = {}
    for y in responses_of(task, size):
        distributions = [table[context_of([*prompt, *y[:t]], order, size)] for t in range(len(y))]
        probability[y] = math.prod(distribution[a] for distribution, a in zip(distributions, y, strict=True))
        paid = reward([""], [""], completion_ids=[list(y)], prompt_ids=[prompt])[0]
        score[y] = paid - (0 if y[-1] == 0 else task.missing_eos_penalty)
    assert sum(probability.values()) == pytest.approx(1)
    reference = sum(p * task.gamma ** (len(y) - 1) * score[y] for y, p in probability.items())
    if task.dense_kl or task.gamma == 1:

        def value(prefix: tuple[int, ...]) -> float:
            distribution = table[context_of([*prompt, *prefix], order, size)]
            total = []
            for a in range(size):
                y = (*prefix, a)
                total.append(math.log(distribution[a]) + (score[y] if y in score else task.gamma * value(y)) / b)
            return b * (max(total) + math.log(sum(math.exp(x - max(total)) for x in total)))

        return value(()), reference
    discount = {y: task.gamma ** (len(y) - 1) for y in score}

    def distribution_at(lam: float) -> dict[tuple[int, ...], float]:
        return {y: probability[y] * math.exp(min(score[y] / b - 1 - lam / b / discount[y], 600.0)) for y in score}

    low = -1e4
    high = 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(distribution_at(middle).values()) > 1 else (low, middle)
    optimal = distribution_at(high)
    objective = 0.0
    for y, q in optimal.items():
        if q > 0:
            objective += q * discount[y] * (score[y] - b * math.log(q / probability[y]))
    return objective, reference


def evaluated(optimum: Optimum, name: str, policy: Callable[[AutomatonSolution], object]) -> Tensor:
    """(X,) one number of the exact evaluation of a policy on every prompt."""
    result = torch.full_like(optimum.values, torch.nan)
    assert isinstance(optimum.policy, AutomatonPolicy)
    for solution in optimum.policy.solutions:
        result[solution.prompts] = getattr(solution.evaluate(policy(solution)), name)
    return result


def random_policy(task: Task, seed: int, scale: float) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Logits that depend on the step, the context and the automaton state, deterministic in them."""
    vocab_size = task.reference().vocab_size
    shape = (task.max_new_tokens, vocab_size ** task.reference().model.config.order, 6, vocab_size)
    table = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda t, contexts, states: table[t, contexts, states]


def make_envs(task: Task, num_envs: int = 2, **kwargs: object) -> RLHFVectorEnv:
    envs = gym.make_vec(
        "lmgym/RLHF-v0", num_envs=num_envs, task=task, split="test", autoreset_mode="SameStep", **kwargs
    )
    assert isinstance(envs, RLHFVectorEnv)
    return envs


# --- random small problems -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_optimum_and_reference_are_those_of_all_responses(seed: int) -> None:
    task, optimum, tree = solved(seed)
    assert optimum.exact
    assert optimum.lower == optimum.upper == optimum.value
    hand = [by_hand(task, ids) for ids in prompts_of(task)]
    torch.testing.assert_close(optimum.values.tolist(), [v for v, _ in hand], rtol=0, atol=1e-9)
    torch.testing.assert_close(optimum.references.tolist(), [r for _, r in hand], rtol=0, atol=1e-9)
    enumerated = tree.solve()
    torch.testing.assert_close(optimum.values, enumerated.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(optimum.references, enumerated.references, rtol=0, atol=1e-5)
    assert (optimum.values > optimum.references).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_response_is_the_best_of_all(seed: int) -> None:
    task = random_task(seed)
    lm = task.reference()
    b = task.kl_coef
    gamma = task.gamma
    reward = task.reward_function()
    table = table_of(task)
    size = lm.model.config.vocab_size
    order = lm.model.config.order
    found = best_response(task)
    values = solve(task).values
    for i, prompt in enumerate(lm.encode_all(tuple(task.prompts["test"]))):
        earned = []
        for y in responses_of(task, size):
            nats = [math.log(table[context_of([*prompt, *y[:t]], order, size)][a]) for t, a in enumerate(y)]
            paid = reward([""], [""], completion_ids=[list(y)], prompt_ids=[prompt])[0]
            paid -= 0 if y[-1] == 0 else task.missing_eos_penalty
            last = gamma ** (len(y) - 1)
            price = sum(gamma**t * x for t, x in enumerate(nats)) if task.dense_kl else last * sum(nats)
            earned.append(last * paid + b * price)
        assert found[i].item() == pytest.approx(max(earned), abs=1e-6)
        assert 0 < values[i] - found[i] < b * math.log(len(earned)) + 1e-9
        if gamma == 1:
            soft = b * torch.tensor(earned, dtype=torch.float64).div(b).logsumexp(0)
            assert values[i].item() == pytest.approx(soft.item(), abs=1e-6)
    torch.testing.assert_close(found, Tree.of(task, "test").best_response(), atol=1e-6, rtol=0)


def test_a_reference_at_a_temperature_is_the_tables_power() -> None:
    """Solved by dynamic programming and by enumeration, it is the problem of the table raised to 1 / T."""
    task = random_task(1)
    lm = task.reference()
    rows = np.array(table_of(task)) ** 2
    powered = CausalLM(freeze(MarkovLM.from_probs(rows / rows.sum(1, keepdims=True), order=1)), lm.tokenizer)
    warm = replace(task, temperature=0.5)
    cold = replace(task, model=powered)
    for solver in (solve_automaton, lambda x: Tree.of(x).solve()):
        assert solver(warm).value == pytest.approx(solver(cold).value, abs=1e-5)
        assert abs(solver(warm).value - solver(task).value) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_evaluation_of_the_optimum_the_reference_and_others(seed: int) -> None:
    task, optimum, tree = solved(seed)
    assert isinstance(optimum.policy, AutomatonPolicy)
    found = evaluated(optimum, "returns", lambda s: s.log_policy)
    torch.testing.assert_close(found, optimum.values, rtol=0, atol=1e-9)
    whole = tree.evaluate(make_episode_logits(optimum.policy))  # as the env drives it
    for name, theirs in (("returns", whole.returns), ("kl", whole.kl), ("score", whole.score)):
        mine = evaluated(optimum, name, lambda s: s.log_policy)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)

    def reference(solution: AutomatonSolution) -> object:
        return lambda t, contexts, states: solution.mdp.reference.probs(contexts).log()

    for policy in (reference, lambda s: None):
        torch.testing.assert_close(evaluated(optimum, "returns", policy), optimum.references, rtol=0, atol=1e-9)
        assert evaluated(optimum, "kl", policy).abs().max() < 1e-9
    other = evaluated(optimum, "returns", lambda s: random_policy(task, 0, 1.0))
    assert (other < optimum.values).all()
    # A step away from pi*, in any direction, is a step down: a maximum (to rounding, where pi* is a point mass).
    step = random_policy(task, 1, 0.05)
    near = evaluated(optimum, "returns", lambda s: lambda t, c, z: s.log_policy(t, c, z) + step(t, c, z))
    assert (near <= optimum.values + 1e-12).all()
    assert (near > optimum.values - 0.01 * max(task.kl_coef, 0.1)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_policy_and_its_values_are_those_of_the_tree(seed: int) -> None:
    """Along random responses, with rows that leave and rows that start again."""
    task, optimum, tree = solved(seed)
    enumerated = tree.solve()
    assert optimum.policy is not None
    assert enumerated.policy is not None
    lm = task.reference()
    ids, mask = make_envs(task).engine.pad_prompts([make_envs(task).engine.prompts[i] for i in (0, 1, 2, 0, 1, 2)])
    states = [p.begin(ids, mask, task.max_new_tokens) for p in (optimum.policy, enumerated.policy)]
    generator = torch.Generator().manual_seed(seed)
    alive = torch.ones(6, dtype=torch.bool)
    position = torch.zeros(6, dtype=torch.int64)
    for step in range(task.max_new_tokens + 3):  # after the end nothing may break
        mine, theirs = states
        assert mine.logits.isfinite().all()
        assert mine.values is not None
        assert theirs.values is not None
        ours = mine.logits[alive]
        torch.testing.assert_close(ours.logsumexp(-1), torch.zeros(len(ours), dtype=torch.float64))
        torch.testing.assert_close(ours.exp(), theirs.logits[alive].exp(), rtol=0, atol=1e-5)
        torch.testing.assert_close(mine.values[alive], theirs.values[alive], rtol=1e-5, atol=1e-5)
        tokens = torch.randint(lm.vocab_size, (len(alive),), generator=generator)
        ends = ((tokens == 0) & (position >= task.min_new_tokens)) | (position == task.max_new_tokens - 1)
        for state in states:
            state.step(tokens)
        alive = alive & ~ends
        position = position + 1
        if step == 0:
            kept = torch.tensor([5, 0, 3, 1])
            for state in states:
                state.keep(kept)
                state.begin(torch.tensor([2, 0]), ids[[1, 2]], mask[[1, 2]])
            alive = alive[kept]
            position = position[kept]
            alive[[2, 0]] = True
            position[[2, 0]] = 0


@pytest.mark.parametrize("seed", [0, 2, 4, 6, 7, 9, 10, 13, 18, 22])
def test_what_the_optimum_earns_in_the_env(seed: int) -> None:
    task, optimum, _ = solved(seed)
    assert optimum.policy is not None
    envs = make_envs(task)
    samples = 500
    prompts = [envs.engine.prompts[i] for i in range(3) for _ in range(samples)]
    episodes = collect(envs, optimum.policy, prompts, generator=torch.Generator().manual_seed(seed))
    rewards = token_rewards(episodes, task.kl_coef, dense=task.dense_kl)
    returns = discounted_return(rewards, task.gamma).double().view(3, samples)
    error = returns.std(1) / samples**0.5
    assert ((returns.mean(1) - optimum.values).abs() < 4 * error + 1e-4).all()
    assert episodes.values is not None
    roots = optimum.values.repeat_interleave(samples)
    torch.testing.assert_close(episodes.values[:, 0].double(), roots, rtol=0, atol=1e-5)
    if task.gamma == 1:  # not one episode is luckier than another
        exact = episodes.scores - task.kl_coef * episode_kl(episodes)
        torch.testing.assert_close(exact.double(), roots, rtol=0, atol=1e-4)
        if task.dense_kl:  # what is left to earn after each prefix, too
            togo = rewards.flip(1).cumsum(1).flip(1)
            kept = episodes.response_mask
            torch.testing.assert_close(togo[kept], episodes.values[kept], rtol=0, atol=1e-4)


def test_stepping_the_env_gives_the_same_episodes() -> None:
    task, optimum, _ = solved(9)
    assert optimum.policy is not None
    one = make_envs(task, 3, prompt_order="sequential")
    other = make_envs(task, 3, prompt_order="sequential")
    for envs in (one, other):
        envs.reset(seed=0)
    fast = collect(one, optimum.policy, 30, generator=torch.Generator().manual_seed(1))
    slow = collect_steps(other, optimum.policy, 30, generator=torch.Generator().manual_seed(1))

    def sorted_returns(episodes: Episodes) -> Tensor:
        return discounted_return(token_rewards(episodes, task.kl_coef), 1.0).sort().values

    assert len(slow) == len(fast) == 30
    # At gamma = 1 a return is V* of its prompt.
    torch.testing.assert_close(sorted_returns(fast), sorted_returns(slow), rtol=0, atol=1e-4)
    assert slow.values is not None
    assert (slow.values[slow.response_mask] != 0).all()


# --- problems whose answer can be written down -----------------------------------------------------------------------


def coin_task(pays: Callable[[int], float] | None = None, **changes: object) -> Task:
    """A fair coin, EOS or "a", two tokens at most; 1 is paid for "a <eos>" and for nothing else."""
    # States: nothing read, one "a", "a <eos>", anything else.
    automaton = Automaton.dense([[3, 1], [2, 3], [3, 3], [3, 3]], [0.0, 0.0, 1.0, 0.0])
    fields = {
        "name": "coin",
        "model": markov_lm([[0.5, 0.5]], ["a"], order=0),
        "reward": AutomatonReward(automaton),
        "prompts": {"test": ["a"]},
        "kl_coef": 0.5,
        "max_new_tokens": 2,
    }
    return Task(**{**fields, **changes})


def test_sign_of_the_kl() -> None:
    """V* = b log E exp(score / b) lies between the mean score and the largest one; flipped, it lies below the mean."""
    optimum = solve_automaton(coin_task())
    assert optimum.value == pytest.approx(0.5 * math.log(0.75 + 0.25 * math.exp(2)))
    assert optimum.reference == pytest.approx(0.25)
    assert optimum.reference < optimum.value < 1
    solution = optimum.policy.solutions[0]
    found = solution.evaluate(solution.log_policy)
    accepted = 0.25 * math.exp(2) / (0.75 + 0.25 * math.exp(2))
    kl = accepted * math.log(accepted / 0.25) + (1 - accepted) * math.log((1 - accepted) / 0.75)
    assert found.score.item() == pytest.approx(accepted)
    assert found.kl.item() == pytest.approx(kl)
    assert found.returns.item() == pytest.approx(accepted - 0.5 * kl)


def test_the_token_from_which_an_eos_ends() -> None:
    """A response of one token exists at `min_new_tokens=0` and not at 1."""
    one_token = Automaton.dense([[1, 1], [2, 2], [2, 2]], [0.0, 1.0, 0.0])
    ends, goes_on = (coin_task(reward=AutomatonReward(one_token), min_new_tokens=n) for n in (0, 1))
    assert solve_automaton(ends).value == pytest.approx(0.5 * math.log(0.5 + 0.5 * math.exp(2)))
    assert solve_automaton(ends).reference == pytest.approx(0.5)
    assert solve_automaton(goes_on).value == pytest.approx(0, abs=1e-12)
    assert solve_automaton(goes_on).reference == 0


def test_the_eos_that_ends_is_read_and_paid_for() -> None:
    """The automaton sees the EOS itself, also as the T-th token, and also where it does not end."""
    counts = Automaton.dense([[0, 0]], [0.0], [[1.0, 0.0]])  # 1 for every EOS read
    reward = AutomatonReward(counts)
    assert solve_automaton(coin_task(reward=reward)).reference == pytest.approx(0.75)
    assert solve_automaton(coin_task(reward=reward, min_new_tokens=1)).reference == pytest.approx(1.0)


def test_penalty_without_an_eos_falls_on_the_length_limit_alone() -> None:
    optimum = solve_automaton(coin_task(missing_eos_penalty=0.6))
    assert optimum.reference == pytest.approx(0.25 - 0.25 * 0.6)
    assert optimum.value == pytest.approx(0.5 * math.log(0.5 + 0.25 * math.exp(2) + 0.25 * math.exp(-1.2)))


def test_what_gamma_discounts() -> None:
    """It discounts the value of the next state: not the score of an action that ends, and not the KL of this step."""
    optimum = solve_automaton(coin_task(gamma=0.6))
    after_a = 0.5 * math.log(0.5 + 0.5 * math.exp(2))
    assert optimum.value == pytest.approx(0.5 * math.log(0.5 + 0.5 * math.exp(0.6 * after_a / 0.5)))
    assert optimum.reference == pytest.approx(0.25 * 0.6)
    solution = optimum.policy.solutions[0]
    q = solution.q(0, torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(q, torch.tensor([[0.0, 0.6 * after_a]], dtype=torch.float64))
    q = solution.q(1, torch.tensor([0]), torch.tensor([1]))
    torch.testing.assert_close(q, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_what_gamma_discounts_where_the_kl_is_paid_last() -> None:
    """Three responses: one of one token, two of two; pi* by a fine grid over distributions on them."""
    task = coin_task(gamma=0.6, dense_kl=False)
    grid = torch.linspace(1e-9, 1, 2001, dtype=torch.float64)
    p = grid[:, None]  # of "a <eos>"; the other two share the rest as q and 1 - q
    best = -math.inf
    for q in torch.linspace(1e-6, 1 - 1e-6, 501, dtype=torch.float64):
        distributions = torch.cat([(1 - p) * q, (1 - p) * (1 - q), p], dim=1)  # "<eos>", "a a", "a <eos>"
        reference = torch.tensor([0.5, 0.25, 0.25])
        scores = torch.tensor([0.0, 0.0, 1.0])
        ratio = torch.where(distributions > 0, (distributions.clamp(min=1e-300) / reference).log(), 0.0)
        discounts = torch.tensor([1.0, 0.6, 0.6])
        best = max(best, float((distributions * discounts * (scores - 0.5 * ratio)).sum(1).max()))
    assert solve_automaton(task).value == pytest.approx(best, abs=1e-5)


def test_at_gamma_0_only_one_token_counts() -> None:
    one_token = AutomatonReward(Automaton.dense([[1, 1], [2, 2], [2, 2]], [0.0, 1.0, 0.0]))
    assert solve_automaton(coin_task(gamma=0.0, reward=one_token)).value == pytest.approx(
        0.5 * math.log(0.5 + 0.5 * math.exp(2))
    )
    late = coin_task(gamma=0.0, reward=one_token, dense_kl=False)
    # The rest of the mass costs nothing: max over the probability p of "<eos>" of p (1 - b log(p / 0.5)).
    assert solve_automaton(late).value == pytest.approx(
        max(p * (1 - 0.5 * math.log(p / 0.5)) for p in np.linspace(0.01, 1, 100000)), abs=1e-6
    )


# --- scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_task() -> None:
    """T = 128, V = 512, 32 states: runs, and keeps what must hold at any size."""
    rng = np.random.default_rng(0)
    model = markov_lm(dirichlet_rows(rng, 512, 512, 0.1), [f"s{i}" for i in range(1, 512)])
    automaton = Automaton(rng.integers(0, 32, (32, 40)), 10 * rng.random(32), rng.integers(0, 40, 512))
    prompts = {"test": [f"s{i}" for i in range(1, 5)]}
    fields = {"name": "large", "model": model, "reward": AutomatonReward(automaton), "prompts": prompts}
    task = Task(**fields, kl_coef=0.01, max_new_tokens=128)
    optimum = solve_automaton(task)
    assert optimum.values.isfinite().all()
    assert (optimum.references < optimum.values).all()
    assert (optimum.values < automaton.payments.max()).all()
    scores, probabilities = optimum.policy.solutions[0].score_distribution()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(probabilities @ scores, optimum.references)


def low_rank(rng: np.random.Generator, vocab_size: int, order: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    return dirichlet_rows(rng, rank, vocab_size, 0.5), dirichlet_rows(rng, vocab_size**order, rank, 0.5)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("gamma", "dense_kl"), [(1.0, True), (0.9, True), (0.9, False)])
def test_a_low_rank_is_the_table_written_out(order: int, gamma: float, dense_kl: bool) -> None:
    rows, mixture = low_rank(np.random.default_rng(order), 6, order, 3)
    symbols = [f"s{i}" for i in range(1, 6)]
    task = random_task(order, gamma=gamma, dense_kl=dense_kl)
    automaton = Automaton.dense(np.random.default_rng(1).integers(0, 4, (4, 6)), [0.0, 1.0, -1.0, 0.5])
    fields = {name: getattr(task, name) for name in ("name", "kl_coef", "min_new_tokens", "missing_eos_penalty")}
    fields |= {"reward": AutomatonReward(automaton), "prompts": {"test": ["s1 s2", "s5"]}, "max_new_tokens": 12}
    fields |= {"gamma": gamma, "dense_kl": dense_kl}
    factored, full = (
        solve_automaton(Task(**fields, model=model))
        for model in (
            markov_lm(rows, symbols, mixture=mixture, order=order),
            markov_lm(mixture @ rows, symbols, order=order),
        )
    )
    assert len(factored.policy.reference.factors) == 2
    torch.testing.assert_close(factored.values, full.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(factored.references, full.references, rtol=0, atol=1e-5)
    contexts = torch.arange(6**order)
    states = torch.zeros(6**order, dtype=torch.int64)
    for t in (0, 5, 11):
        ours, theirs = (o.policy.solutions[0].log_policy(t, contexts, states) for o in (factored, full))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    ours, theirs = (o.policy.solutions[0].evaluate(random_policy_of(12, 6**order)) for o in (factored, full))
    torch.testing.assert_close(ours.returns, theirs.returns, rtol=0, atol=1e-5)


def random_policy_of(horizon: int, contexts: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    table = torch.randn((horizon, contexts, 4, 6), generator=torch.Generator().manual_seed(0))
    return lambda t, c, s: table[t, c, s]


def test_factors_too_small_to_factor_are_multiplied_out() -> None:
    """The model raises probabilities to a floor, which matters at a small kl_coef: the solver must see it too."""
    rows = np.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    mixture = dirichlet_rows(np.random.default_rng(0), 3, 2, 1.0)
    model = markov_lm(rows, ["a", "b"], mixture=mixture)
    assert len(ReferenceTable(model).factors) == 1
    pays_b = AutomatonReward(Automaton.dense([[0, 0, 1], [0, 0, 1]], [0.0, 1.0]))
    task = Task(name="t", model=model, reward=pays_b, prompts={"test": ["a"]}, kl_coef=0.02, max_new_tokens=1)
    optimum = solve_automaton(task)
    assert optimum.value == pytest.approx(1 + 0.02 * math.log(1e-12), rel=1e-6)
    torch.testing.assert_close(optimum.values, Tree.of(task).solve().values, rtol=0, atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="`rows` of a low-rank model of this size must not be below 1e-12"):
        size = 2100
        rows = np.zeros((1, size))
        rows[0, 0] = 1.0
        lm = markov_lm(rows, [f"s{i}" for i in range(1, size)], mixture=np.ones((size, 1)))
        ReferenceTable(lm)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_a_small_kl_coef_against_log_space(order: int, scale: float) -> None:
    """Payments of 10 at 0.01 are factors of exp(1000), and rows have zeros where the best actions are."""
    rng = np.random.default_rng(7 + order)
    rows = dirichlet_rows(rng, 5**order, 5, 0.3)
    rows = np.where(rng.random(rows.shape) < 0.5, 0.0, rows) + 1e-13
    rows /= rows.sum(1, keepdims=True)
    automaton = Automaton.dense(rng.integers(0, 4, (4, 5)), scale * rng.random(4), scale * rng.random((4, 5)))
    fields = {"name": "t", "reward": AutomatonReward(automaton), "prompts": {"test": ["s1", "s2 s3"]}}
    model = markov_lm(rows, [f"s{i}" for i in range(1, 5)], order=order)
    task = Task(**fields, model=model, kl_coef=0.01, max_new_tokens=6)
    optimum = solve_automaton(task)
    distribution = MarkovLM.probs(model.model, torch.arange(5**order)).double().clamp(min=1e-12)
    log_ref = (distribution / distribution.sum(1, keepdim=True)).log()
    value = torch.zeros((5**order, 4), dtype=torch.float64)
    for t in reversed(range(6)):
        terms = torch.zeros((5**order, 4, 5), dtype=torch.float64)
        for c, s, a in itertools.product(range(5**order), range(4), range(5)):
            after = int(automaton.transitions[s, automaton.classes[a]])
            column = automaton.classes[a]
            q = automaton.token_payments[s, column]
            ends = a == 0 or t == 5
            following = (0, a, c % 5 * 5 + a)[order]
            q += automaton.payments[after] if ends else float(value[following, after])
            terms[c, s, a] = log_ref[c, a] + q / 0.01
        value = 0.01 * terms.logsumexp(-1)
        torch.testing.assert_close(optimum.policy.solutions[0].values[t], value, rtol=0, atol=1e-9)
    found = evaluated(optimum, "returns", lambda s: s.log_policy)
    torch.testing.assert_close(found, optimum.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("factored", [False, True])
def test_log_matmul(groups: int, factored: bool) -> None:
    """Against log-sum-exp entry by entry, over ranges that underflow, and with the least entries a table can have."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, 1e-12, x)

    factors = [draw(groups, 6, 2), draw(1, 2, 5)] if factored else [draw(groups, 6, 5)]
    product = factors[0] @ factors[1] if factored else factors[0]
    for x_groups, scale in itertools.product((1, groups), (1.0, 300.0, 5000.0)):
        log_x = scale * torch.randn((x_groups, 5, 4), generator=generator, dtype=torch.float64)
        log_x[:, 1, :2] = -torch.inf
        log_x[:, :, 3] = -torch.inf
        slow = (product.log().unsqueeze(-1) + log_x.unsqueeze(1)).logsumexp(2)
        torch.testing.assert_close(log_matmul(factors, log_x), slow, rtol=1e-12, atol=1e-12)
        if scale > 1000:
            assert log_x.exp().isinf().any()  # what the largest entry is taken out for


# --- the rest of the interface -------------------------------------------------------------------------------------


def test_score_distribution_against_all_responses() -> None:
    for seed, base in enumerate((0, 1, 2, 4, 5)):
        task = random_task(base)
        own = task.reward_function().for_prompt(prompts_of(task)[0])
        plain = AutomatonReward(Automaton(own.transitions, own.payments.round(), own.classes, None, own.initial))
        task = random_task(base, reward=plain, missing_eos_penalty=0.25)
        optimum = solve_automaton(task)
        tree = Tree.of(task)
        (solution,) = optimum.policy.solutions if task.dense_kl or task.gamma == 1 else optimum.policy.solutions[:1]
        for policy, distribution in (
            (None, tree.evaluate(make_episode_logits(task.reference()))),
            (solution.log_policy, None),
        ):
            scores, probabilities = solution.score_distribution(policy)
            torch.testing.assert_close(probabilities.sum(1), torch.ones(len(probabilities), dtype=torch.float64))
            torch.testing.assert_close(probabilities @ scores, solution.evaluate(policy).score)
            if distribution is not None and len(solution.prompts) == 3:
                known, expected = distribution.score_distribution
                mine = dict(zip(scores.tolist(), probabilities.mean(0).tolist(), strict=True))
                for x, p in zip(known.tolist(), expected.tolist(), strict=True):
                    assert mine[x] == pytest.approx(p, abs=1e-6), seed


def test_a_noisy_reward_is_solved_for_what_it_pays_on_average() -> None:
    task, optimum, _ = solved(1)
    noisy = random_task(1, reward=NoisyReward(task.reward_function(), 3.0))
    torch.testing.assert_close(solve_automaton(noisy).values, optimum.values)


def test_each_automaton_is_solved_once() -> None:
    task, optimum, _ = solved(1)
    assert task.gamma == 1
    (solution,) = optimum.policy.solutions
    assert solution.prompts.tolist() == [0, 1, 2]
    calls = []

    def automaton(prompt_ids: tuple[int, ...]) -> Automaton:
        calls.append(prompt_ids)
        return own

    own = task.reward_function().for_prompt([1])
    several = solve_automaton(random_task(1, reward=AutomatonReward(automaton)))
    assert len(several.policy.solutions) == 1
    torch.testing.assert_close(several.values, optimum.values)
    assert len(calls) == len({tuple(ids) for ids in prompts_of(task)})


def test_a_prompt_from_elsewhere_is_solved_when_it_is_met() -> None:
    task, optimum, _ = solved(0)
    before = len(optimum.policy.solutions)
    ids = torch.tensor([[2, 2, 2, 1, 1]])
    state = optimum.policy.begin(ids, torch.ones_like(ids, dtype=torch.bool), task.max_new_tokens)
    assert len(optimum.policy.solutions) == before + 1
    assert optimum.policy.solutions[-1].prompts.tolist() == [-1]
    assert state.values.item() == pytest.approx(by_hand(task, ids[0].tolist())[0], abs=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rank", [None, 3])
def test_embeddings_and_ids_beyond_the_tokenizer_are_no_actions(order: int, rank: int | None) -> None:
    """7 tokens in the table, 5 in the tokenizer, one of them a hole: the rest is normalised, contexts keep numbers."""
    tokenizer = symbol_tokenizer(["a", "b", "c"])
    tokenizer.add_tokens(["d"])
    rng = np.random.default_rng(0)
    rows, mixture = low_rank(rng, 7, order, 3) if rank else (dirichlet_rows(rng, 7**order, 7, 1.0), None)
    model = MarkovLM.from_probs(rows, mixture, order=order)
    lm = CausalLM(freeze(model), tokenizer)
    assert lm.vocab_size == 5
    lm.holes.append(2)
    automaton = Automaton.dense(rng.integers(0, 3, (3, 5)), rng.normal(size=3), rng.normal(size=(3, 5)))
    fields = {"name": "t", "model": lm, "reward": AutomatonReward(automaton), "prompts": {"test": ["a c", "d"]}}
    for late in (False, True):
        task = Task(**fields, kl_coef=0.3, max_new_tokens=3, dense_kl=not late, gamma=0.9 if late else 1.0)
        optimum = solve_automaton(task)
        enumerated = Tree.of(task).solve()
        torch.testing.assert_close(optimum.values, enumerated.values, rtol=0, atol=1e-5)
        torch.testing.assert_close(optimum.references, enumerated.references, rtol=0, atol=1e-5)
        ids = torch.tensor([[1, 3]])
        logits = optimum.policy.begin(ids, ids > 0, 3).logits
        assert logits[0, 2] == -torch.inf
        assert logits[0].exp().sum() == pytest.approx(1)
        found = evaluated(optimum, "returns", lambda s: lambda t, c, z: torch.zeros((len(c), 5)))
        assert found.isfinite().all()
        assert (found < optimum.values).all()


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        solve_automaton(coin_task(kl_coef=0.0))
    paid = AutomatonReward(Automaton.dense([[0, 0]], [0.0], [[1.0, 0.0]]))
    with pytest.raises(InvalidArgumentError, match="`gamma` must be 1 where an automaton pays for tokens, got 0.9"):
        solve_automaton(coin_task(gamma=0.9, reward=paid))
    solve_automaton(coin_task(gamma=0.9, reward=AutomatonReward(Automaton.dense([[0, 0]], [0.0], [[0.0, 0.0]]))))
    with pytest.raises(InvalidArgumentError, match="`reward` must be an AutomatonReward"):
        solve_automaton(TinyProblem().task, "train")
    lm = CausalLM(freeze(gpt2(6)), word_tokenizer(["x", "y", "z"]))
    with pytest.raises(InvalidArgumentError, match="`model` must be a MarkovLM for this solver, got GPT2LMHeadModel"):
        solve_automaton(coin_task(model=lm))
    with pytest.raises(InvalidArgumentError, match="`classes` of the automaton must cover the 2 tokens, got 1."):
        solve_automaton(coin_task(reward=AutomatonReward(Automaton.dense([[0]], [0.0]))))
    solution = solve_automaton(coin_task(reward=paid)).policy.solutions[0]
    with pytest.raises(InvalidArgumentError, match="`token_payments` must be None or 0"):
        solution.score_distribution()
    late = solve_automaton(coin_task(gamma=0.9, dense_kl=False)).policy
    with pytest.raises(InvalidArgumentError, match="`gamma` must be 1 for the table"):
        _ = late.solutions[0].values
    ids = torch.tensor([[1]])
    with pytest.raises(InvalidArgumentError, match="`max_new_tokens` must be at most 2, got 3."):
        late.begin(ids, ids > 0, 3)
