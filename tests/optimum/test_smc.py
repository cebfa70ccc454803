"""Both bounds on the optimum where it can be had by writing every response down."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import TinyProblem, gpt2, shifted, table_reward
from torch import Tensor

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.decoding import PlainDecoder
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.models.ring import RingDecoder
from lmgym.optimum.bounds import Mixture, log_weights, multi_sample_bound
from lmgym.optimum.rejection import rejection_samples
from lmgym.optimum.resampling import conditional_stratified, stratified
from lmgym.optimum.sandwich import sandwich
from lmgym.optimum.smc import smc
from lmgym.rewards.base import RewardFunction
from lmgym.rewards.noise import NoisyReward
from lmgym.rollout import collect


@pytest.fixture(scope="module")
def problem() -> TinyProblem:
    return TinyProblem()


@pytest.fixture(scope="module")
def cheap() -> TinyProblem:
    """KL is cheap: weights vary by e^20 and more."""
    return TinyProblem(kl_coef=0.05)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(shifted(seed))


def runs(problem: TinyProblem, prompt: str, n: int) -> list[list[int]]:
    return [problem.lm.encode(prompt)] * n


def near(problem: TinyProblem) -> CausalLM:
    """A model some way from the reference to `other`: 0.1 to 0.3 nats off, log-ratios up to 2."""
    model = gpt2(6, n_positions=16, scale=0.4)
    with torch.no_grad():
        for own, theirs in zip(model.parameters(), problem.other.model.parameters(), strict=True):
            own.lerp_(theirs, 0.05)
    return CausalLM(freeze(model), problem.lm.tokenizer)


def models(problem: TinyProblem) -> dict[str, CausalLM]:
    return {"reference": problem.lm, "near": near(problem), "other": problem.other}


def with_critic(problem: TinyProblem, lm: CausalLM) -> CausalPolicy:
    """A policy with a value head that knows nothing, yet twists the weights by a nat or so."""
    head = torch.nn.Linear(32, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(0.2 * problem.kl_coef * torch.randn((1, 32), generator=seeded(7)))
    return CausalPolicy(lm, head)


def is_z_score_of(found: Tensor, expected: float) -> bool:
    """Whether the mean of (n,) draws is within 4 standard errors of what it should be."""
    error = found.std().item() / math.sqrt(len(found))
    assert error < 0.15 * abs(expected) + 0.02, "too few draws to tell anything"
    return abs(found.mean().item() - expected) < 4 * error


def critic(problem: TinyProblem) -> CausalPolicy:
    return with_critic(problem, near(problem))


def exact_samples(problem: TinyProblem, prompt: str, n: int, seed: int) -> list[tuple[int, ...]]:
    """Draws from the distribution of all responses at the optimum, written down."""
    distribution = problem.optimum(prompt)[1].exp()
    points = torch.rand(n, generator=seeded(seed), dtype=torch.float64)
    return [
        problem.responses[i]
        for i in torch.searchsorted(distribution.cumsum(0), points).clamp(max=len(distribution) - 1).tolist()
    ]


class ExactPolicy:
    """A table of V* of every prefix, with the distribution of the reference, or that of the optimum."""

    def __init__(self, problem: TinyProblem, *, optimal: bool) -> None:
        self.device = torch.device("cpu")
        self.tables: dict[tuple[int, ...], tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], Tensor]]] = {}
        for prompt in problem.prompts:
            reference = problem.token_log_probs(problem.lm, prompt)
            weights = reference.sum(1) + problem.scores(prompt) / problem.kl_coef
            values = {}
            distributions = {}
            prefixes = {r[:t] for r in problem.responses for t in range(len(r))}
            for prefix in prefixes:
                t = len(prefix)
                under = [i for i, r in enumerate(problem.responses) if r[:t] == prefix and len(r) > t]
                values[prefix] = problem.kl_coef * float(weights[under].logsumexp(0) - reference[under[0], :t].sum())
                distribution = torch.full((6,), -torch.inf, dtype=torch.float64)
                for a in range(6):
                    after = [i for i in under if problem.responses[i][t] == a]
                    masses = weights[after] if optimal else reference[after].sum(1)
                    distribution[a] = masses.logsumexp(0)
                distributions[prefix] = distribution.log_softmax(0)
            self.tables[tuple(problem.lm.encode(prompt))] = (values, distributions)

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> ExactState:
        prompts = [tuple(i[m].tolist()) for i, m in zip(prompt_ids, prompt_mask, strict=True)]
        return ExactState(self, [(prompt, ()) for prompt in prompts])


class ExactState:
    def __init__(self, policy: ExactPolicy, rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        self.policy = policy
        self.rows = rows

    @property
    def logits(self) -> Tensor:
        nowhere = torch.zeros(6, dtype=torch.float64)
        return torch.stack([self.policy.tables[x][1].get(y, nowhere) for x, y in self.rows])

    @property
    def values(self) -> Tensor:
        return torch.tensor([self.policy.tables[x][0].get(y, 99.0) for x, y in self.rows])

    def step(self, tokens: Tensor) -> None:
        self.rows = [(x, (*y, a)) for (x, y), a in zip(self.rows, tokens.tolist(), strict=True)]

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        raise AssertionError("nobody restarts a row")


# -- the estimate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [RingDecoder, PlainDecoder])
def test_a_state_may_keep_a_row_more_than_once(problem: TinyProblem, decoder: type) -> None:
    prompts = [[3], [4, 5], [5, 5, 3]]
    first = [2, 3, 4]
    second = [5, 0, 3, 4, 2]
    kept = [2, 0, 0, 2, 1]
    state = decoder(problem.lm, 3, 6)
    ids = torch.tensor([[0, 0, 3], [0, 4, 5], [5, 5, 3]])
    state.begin(torch.arange(3), ids, torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]]).bool())
    state.step(torch.tensor(first))
    state.keep(torch.tensor(kept))
    histories = [[*prompts[i], first[i]] for i in kept]
    for tokens in ([], second, second[::-1]):
        if tokens:
            state.step(torch.tensor(tokens))
            histories = [[*h, a] for h, a in zip(histories, tokens, strict=True)]
        for row, history in zip(state.logits, histories, strict=True):
            with torch.no_grad():
                plain = problem.lm.model(input_ids=torch.tensor([history])).logits[0, -1]
            torch.testing.assert_close(row, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("which", "resample_at"),
    [("reference", 0.5), ("reference", 1.0), ("near", 0.0), ("near", 0.5), ("near", 1.0), ("mixture", 0.5)],
)
def test_z_hat_is_z_on_average(problem: TinyProblem, which: str, resample_at: float) -> None:
    policies: dict[str, Policy] = {name: with_critic(problem, lm) for name, lm in models(problem).items()}
    policies["mixture"] = Mixture([CausalPolicy(problem.lm), policies["near"]], [0.3, 0.7])
    prompt_ids = [ids for prompt in problem.prompts for ids in runs(problem, prompt, 500)]
    found = smc(problem.task, prompt_ids, policies[which], 4, seeded(1), resample_at=resample_at)
    for prompt, log_z in zip(problem.prompts, found.log_z.split(500), strict=True):
        value, _ = problem.optimum(prompt)
        assert is_z_score_of((log_z - value / problem.kl_coef).exp(), 1.0)


def test_without_resampling_it_is_the_multi_sample_bound(problem: TinyProblem) -> None:
    """Whatever the critic says, the last weights are those of the whole responses."""
    prompt_ids = [problem.lm.encode(p) for p in problem.prompts]
    for policy, resample_at in ((with_critic(problem, problem.other), 0.0), (CausalPolicy(problem.other), 0.5)):
        found = smc(problem.task, prompt_ids, policy, 32, seeded(3), resample_at=resample_at)
        for x, prompt in enumerate(problem.prompts):
            rows = [problem.responses.index(found.response(x, s)) for s in range(32)]
            ratio = problem.token_log_probs(problem.lm, prompt) - problem.token_log_probs(problem.other, prompt)
            scores = problem.scores(prompt)[rows]
            torch.testing.assert_close(found.scores[x], scores, rtol=0, atol=1e-6)
            weights = ratio[rows].sum(1) + scores / problem.kl_coef
            torch.testing.assert_close(found.log_weights[x], weights, rtol=0, atol=1e-5)
        bound = multi_sample_bound(found.log_weights, problem.kl_coef)
        torch.testing.assert_close(problem.kl_coef * found.log_z, bound, rtol=0, atol=1e-9)


def test_it_agrees_with_collecting_episodes_and_weighing_them() -> None:
    """The same through the environment: lengths, ends, texts, min_new_tokens and the penalty."""

    def reward(prompts: list[str], completions: list[str], **columns: list[list[int]]) -> list[float]:
        words = [0.1 * len((p + c).split()) - 0.03 * len(c) for p, c in zip(prompts, completions, strict=True)]
        both = zip(columns["prompt_ids"], columns["completion_ids"], strict=True)
        weighed = [0.01 * len(ids) * sum(p) for p, ids in both]
        return [a + b for a, b in zip(words, weighed, strict=True)]

    problem = TinyProblem(horizon=4, reward=reward, min_new_tokens=1, missing_eos_penalty=0.3)
    envs = RLHFVectorEnv(1, autoreset_mode="Disabled", task=problem.task, device="cpu")
    prompts = [envs.engine.prompts[i] for i in range(3)]
    found = smc(problem.task, [p.ids for p in prompts], CausalPolicy(problem.other), 20, seeded(4))
    assert set(found.lengths.view(-1).tolist()) == {2, 3, 4}
    repeated = [p for p in prompts for _ in range(20)]
    replay = envs.replay(repeated, found.response_ids.view(60, 4).numpy())
    assert replay.response_mask.sum(1).tolist() == found.lengths.view(-1).tolist()
    torch.testing.assert_close(found.scores.view(-1), torch.tensor(replay.outcomes.scores, dtype=torch.float64))
    episodes = collect(envs, CausalPolicy(problem.other), repeated, generator=seeded(4))
    assert torch.equal(episodes.response_ids * episodes.response_mask, found.response_ids.view(60, 4))
    weights = log_weights(episodes, problem.kl_coef).view(3, 20)
    torch.testing.assert_close(found.log_weights, weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resample_at", [0.0, 1.0])
def test_an_eos_that_comes_too_early_is_a_token_like_the_rest(resample_at: float) -> None:
    problem = TinyProblem(horizon=2, min_new_tokens=1, missing_eos_penalty=0.5)
    problem.responses = list(itertools.product(range(6), repeat=2))
    found = smc(problem.task, runs(problem, "y z", 800), critic(problem), 4, seeded(5), resample_at=resample_at)
    missing = torch.tensor([float(r[-1] != 1) for r in problem.responses])
    log_pi = problem.token_log_probs(problem.lm, "y z").sum(1)
    log_z = (log_pi + (problem.scores("y z") - 0.5 * missing) / problem.kl_coef).logsumexp(0)
    assert is_z_score_of((found.log_z - log_z).exp(), 1.0)
    assert (found.lengths == 2).all()


def test_one_particle_earns_j_on_average(problem: TinyProblem) -> None:
    """S = 1 is no tighter than the policy itself, resampled or not."""
    for prompt in problem.prompts:
        log_pi = problem.token_log_probs(near(problem), prompt).sum(1)
        found = smc(problem.task, runs(problem, prompt, 3000), critic(problem), 1, seeded(6), resample_at=1.0)
        assert is_z_score_of(problem.kl_coef * found.log_z, problem.objective(prompt, log_pi))


@pytest.mark.parametrize("resample_at", [0.0, 0.5, 1.0])
def test_at_the_optimum_with_its_values_every_estimate_is_exact(cheap: TinyProblem, resample_at: float) -> None:
    """From both sides: log_z = V* / kl_coef for one particle and for many, with no noise at all."""
    optimal = ExactPolicy(cheap, optimal=True)
    values = torch.tensor([cheap.optimum(p)[0] for p in cheap.prompts], dtype=torch.float64)
    prompt_ids = [cheap.lm.encode(p) for p in cheap.prompts]
    exact = [exact_samples(cheap, p, 1, 0)[0] for p in cheap.prompts]
    for particles, retained in itertools.product((1, 6), (None, exact)):
        found = smc(cheap.task, prompt_ids, optimal, particles, seeded(7), retained=retained, resample_at=resample_at)
        torch.testing.assert_close(cheap.kl_coef * found.log_z, values, rtol=0, atol=1e-5)


def test_good_values_beat_plain_importance_sampling() -> None:
    """The reference proposes in both; only the twist tells which prefixes to go on with.

    Every token earns something, so that a good response is a row of lucky tokens: hopeless to draw at once.
    """
    earns = torch.tensor([-1.0, 0.0, -0.5, -0.2, 0.7, 0.2], dtype=torch.float64)

    def reward(prompts: list[str], completions: list[str], **columns: list[list[int]]) -> list[float]:
        return [float(earns[ids].sum()) for ids in columns["completion_ids"]]

    problem = TinyProblem(horizon=4, kl_coef=0.1)
    problem.lm = CausalLM(freeze(gpt2(6, n_positions=16, scale=0.1)), problem.lm.tokenizer)  # hardly prefers a token
    problem.task = replace(problem.task, model=problem.lm, reward=reward)
    problem.prompts = ["x"]
    problem.scores = lambda _: torch.tensor(  # type: ignore[method-assign]
        [float(earns[list(r)].sum()) for r in problem.responses], dtype=torch.float64
    )
    value, _ = problem.optimum("x")
    gaps = []
    for policy in (CausalPolicy(problem.lm), ExactPolicy(problem, optimal=False)):
        found = smc(problem.task, runs(problem, "x", 60), policy, 16, seeded(8))
        gaps.append(value - problem.kl_coef * found.log_z.mean().item())
    assert 0 < gaps[1] < 0.5 * gaps[0], gaps


def test_runs_do_not_feel_each_other(problem: TinyProblem) -> None:
    """Each prompt has its own Z: none leaks into the run beside it through resampling."""
    policy = critic(problem)
    prompt_ids = [problem.lm.encode(p) for p in problem.prompts]
    found = smc(problem.task, prompt_ids, policy, 6, seeded(9), resample_at=1.0)
    for x, prompt in enumerate(problem.prompts):
        rows = [problem.responses.index(found.response(x, s)) for s in range(6)]
        torch.testing.assert_close(found.scores[x], problem.scores(prompt)[rows], rtol=0, atol=1e-6)
    again = smc(problem.task, prompt_ids, policy, 6, seeded(9), resample_at=1.0)
    assert torch.equal(found.log_z, again.log_z)
    assert torch.equal(found.response_ids, again.response_ids)


def test_a_noisy_reward_is_bounded_without_its_noise(problem: TinyProblem) -> None:
    class Noisy:
        expected = staticmethod(table_reward)

        def __call__(self, prompts: list[str], completions: list[str], **columns: object) -> Sequence[float]:
            raise AssertionError("the noise is asked for")

    task = replace(problem.task, reward=Noisy())
    found = smc(task, runs(problem, "x", 1), CausalPolicy(problem.lm), 8, seeded(10))
    plain = smc(problem.task, runs(problem, "x", 1), CausalPolicy(problem.lm), 8, seeded(10))
    assert torch.equal(found.log_z, plain.log_z)


# -- resampling --------------------------------------------------------------------------------------------------------


def test_stratified_offspring_are_as_many_as_the_weights_say() -> None:
    shares = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    uniforms = torch.rand((2000, 2, 4), generator=seeded(11), dtype=torch.float64)
    drawn = torch.stack([stratified(shares.log() + 700, u) for u in uniforms])
    counts = torch.nn.functional.one_hot(drawn, 4).sum(2).double()
    torch.testing.assert_close(counts.mean(0), 4 * shares, rtol=0, atol=0.05)
    assert (counts[:, 1] == torch.tensor([0.0, 4.0, 0.0, 0.0])).all()
    assert (counts[:, 0, 0] == 2).all()  # half of four strata, whole ones
    last = torch.full((1, 4), 1 - 2.0**-53, dtype=torch.float64)  # rounds to the very ends of the strata
    for row in torch.rand((200, 4), generator=seeded(11), dtype=torch.float64):
        assert stratified(row.log()[None], last).max() <= 3


def test_conditional_resampling_of_a_particle_drawn_by_weight_is_resampling() -> None:
    """Then ancestors are distributed as in `stratified`; where the retained child goes is uniform, and apart from them.

    That is what the identity of conditional SMC rests on; a retained child at a fixed index, or at any with the same
    chance, breaks it.
    """
    n = 40_000
    shares = torch.tensor([0.55, 0.15, 0.3], dtype=torch.float64)
    position = torch.searchsorted(shares.cumsum(0), torch.rand(n, generator=seeded(12), dtype=torch.float64))
    uniforms = torch.rand((n, 4), generator=seeded(13), dtype=torch.float64)
    ancestors, child = conditional_stratified(shares.log().repeat(n, 1), uniforms[:, :3], position, uniforms[:, 3])
    assert torch.equal(ancestors.gather(1, child[:, None]).squeeze(1), position)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), shares.cumsum(0)])
    strata = torch.arange(4, dtype=torch.float64) / 3
    overlap = torch.minimum(edges[1:], strata[1:, None]) - torch.maximum(edges[:-1], strata[:-1, None])
    distribution = 3 * overlap.clamp(min=0)  # (child, ancestor)
    torch.testing.assert_close(distribution.sum(1), torch.ones(3, dtype=torch.float64))
    for i, a, b, c in itertools.product(range(3), repeat=4):
        p = float(distribution[0, a] * distribution[1, b] * distribution[2, c]) / 3
        count = int(((ancestors == torch.tensor([a, b, c])).all(1) & (child == i)).sum())
        assert abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p)), (i, a, b, c)


# -- conditional SMC ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample_at", [0.0, 1.0])
@pytest.mark.parametrize("particles", [1, 3])
def test_one_over_z_hat_is_one_over_z_on_average_with_a_sample_of_the_optimum(
    particles: int, resample_at: float
) -> None:
    """Every response is retained as often and weighed with pi*: draws of pi* would miss the rare, large weights."""
    problem = TinyProblem(kl_coef=1.0)
    repeats = 8
    retained = [response for response in problem.responses for _ in range(repeats)]
    for prompt in problem.prompts:
        value, log_distribution = problem.optimum(prompt)
        ids = runs(problem, prompt, len(retained))
        policy = critic(problem)
        found = smc(problem.task, ids, policy, particles, seeded(14), retained=retained, resample_at=resample_at)
        inverses = (value / problem.kl_coef - found.log_z).exp().view(-1, repeats)
        distribution = log_distribution.exp()
        error = (distribution.square() * inverses.var(1) / repeats).sum().sqrt().item()
        assert error < 0.2
        error_of_mean = abs((distribution * inverses.mean(1)).sum().item() - 1)
        assert error_of_mean < 4 * error + 1e-4  # of one particle nothing is random
        kept = torch.tensor([any(found.response(x, s) == y for s in range(particles)) for x, y in enumerate(retained)])
        assert kept.all()  # never resampled away


def test_a_retained_sample_of_another_distribution_breaks_the_identity(problem: TinyProblem) -> None:
    """So the test above would see it: here it is a sample of the reference."""
    value, _ = problem.optimum("x")
    distribution = problem.token_log_probs(problem.lm, "x").sum(1).exp()
    points = torch.rand(2000, generator=seeded(15), dtype=torch.float64)
    wrong = [
        problem.responses[i]
        for i in torch.searchsorted(distribution.cumsum(0), points).clamp(max=len(distribution) - 1).tolist()
    ]
    found = smc(problem.task, runs(problem, "x", 2000), critic(problem), 2, seeded(16), retained=wrong)
    inverse = (value / problem.kl_coef - found.log_z).exp()
    assert abs(inverse.mean() - 1) > 6 * inverse.std() / math.sqrt(2000)


def test_the_retained_sample_begins_at_any_index(problem: TinyProblem) -> None:
    n = 900
    found = smc(
        problem.task, runs(problem, "x", n), critic(problem), 3, seeded(27), retained=[(3, 3, 3)] * n, resample_at=0
    )
    positions = [s for x in range(n) for s in range(3) if found.response(x, s) == (3, 3, 3)]
    extra = (len(positions) - n) / 3  # drawn afresh
    for s in range(3):
        assert abs(positions.count(s) - extra - n / 3) < 4 * math.sqrt(n * 2 / 9 + extra)


def test_the_plain_upper_bound_is_that_of_one_known_and_fresh_weights(problem: TinyProblem) -> None:
    """kl_coef E log (1/S) (w(y*) + the rest), against the sum over all pairs of responses."""
    policy = CausalPolicy(near(problem))
    for prompt in problem.prompts:
        value, optimal = problem.optimum(prompt)
        ratio = problem.token_log_probs(problem.lm, prompt) - problem.token_log_probs(policy.lm, prompt)
        weights = ratio.sum(1) + problem.scores(prompt) / problem.kl_coef
        distribution = problem.token_log_probs(policy.lm, prompt).sum(1).exp()
        both = torch.logaddexp(weights[:, None], weights[None, :]) - math.log(2)
        expected = problem.kl_coef * float((optimal.exp()[:, None] * distribution[None, :] * both).sum())
        assert expected > value + 1e-3
        exact = exact_samples(problem, prompt, 1000, 1)
        ids = runs(problem, prompt, 1000)
        found = smc(problem.task, ids, policy, 2, seeded(17), retained=exact)
        assert is_z_score_of(problem.kl_coef * found.log_z, expected)


@pytest.mark.slow
def test_the_bounds_stand_on_their_own_sides_and_tighten(problem: TinyProblem) -> None:
    policy = critic(problem)
    for prompt in problem.prompts:
        value, _ = problem.optimum(prompt)
        low = []
        high = []
        for particles, n in ((1, 500), (3, 250), (9, 120)):
            exact = exact_samples(problem, prompt, n, particles)
            for side, retained in ((low, None), (high, exact)):
                ids = runs(problem, prompt, n)
                found = smc(problem.task, ids, policy, particles, seeded(18), retained=retained)
                side.append(problem.kl_coef * found.log_z.mean().item())
        assert low[0] < low[1] < low[2] < value < high[2] < high[1] < high[0]


@pytest.mark.parametrize("response", [(), (3,), (1, 3), (3, 1, 4), (3, 4, 5, 3), (3, 9, 4), (3, 4, -1)])
def test_a_retained_response_is_a_whole_one(problem: TinyProblem, response: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="`retained` must hold whole responses, up to their end, got"):
        smc(problem.task, runs(problem, "x", 1), CausalPolicy(problem.lm), 2, seeded(0), retained=[response])


# -- exact samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_score", [1.0, 1.3])
def test_rejection_samples_follow_the_optimum(max_score: float) -> None:
    problem = TinyProblem(horizon=2)
    n = 600
    found = rejection_samples(problem.task, "train", max_score, n, 60_000, seeded(19))
    for prompt, samples in zip(problem.prompts, found, strict=True):
        assert len(samples) == n
        distribution = problem.optimum(prompt)[1].exp()
        for response, p in zip(problem.responses, distribution.tolist(), strict=True):
            assert abs(samples.count(response) - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1


def test_a_score_above_the_highest_raises(problem: TinyProblem) -> None:
    with pytest.raises(LmGymError, match="`max_score` must be what no score is above, got 0.2, and saw a score of 0"):
        rejection_samples(problem.task, "train", 0.2, 5, 1000, seeded(20))
    with pytest.raises(LmGymError, match="`max_score` must be what no score is above"):
        sandwich(problem.task, "train", max_score=0.2, particles=4, repeats=2, generator=seeded(20))


def test_where_rejection_is_not_affordable_it_says_for_which_prompts(cheap: TinyProblem) -> None:
    message = r"every prompt 3 samples .* fewer to prompts \[0, 1, 2\], and none to prompts \[0, 1, 2\]"
    with pytest.raises(LmGymError, match=message):
        rejection_samples(cheap.task, "train", 2.5, 3, 2000, seeded(21))
    task = replace(cheap.task, reward=rarely_for("y z"))
    with pytest.raises(LmGymError, match=r"fewer to prompts \[1\], and none to prompts \[\]"):
        rejection_samples(task, "train", 1.0, 200, 600, seeded(22))


def rarely_for(prompt: str) -> RewardFunction:
    """Pays 1 for every response to other prompts, and to this one for those that begin with token 0."""

    def reward(prompts: list[str], completions: list[str], **columns: list[list[int]]) -> list[float]:
        return [float(p != prompt or ids[0] == 0) for p, ids in zip(prompts, columns["completion_ids"], strict=True)]

    return reward


# -- the sandwich ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["reference", "near", "critic", "other", "mixture"])
@pytest.mark.parametrize("kl_coef", [0.4, 0.05])
def test_the_sandwich_holds_the_optimum(proposal: str, kl_coef: float) -> None:
    """Of all prompts together, and of one alone; the bad critic and `other` are asked for nothing but holding."""
    problem = TinyProblem(kl_coef=kl_coef)
    policies: dict[str, Policy | None] = {
        "reference": None,
        "near": CausalPolicy(near(problem)),
        "critic": critic(problem),
        "other": CausalPolicy(problem.other),
        "mixture": Mixture([CausalPolicy(problem.lm), CausalPolicy(problem.other)], [0.5, 0.5]),
    }
    top = max(problem.scores(p).max().item() for p in problem.prompts) + 1e-6
    options = {"proposal": policies[proposal], "particles": 32, "repeats": 12, "max_score": top, "budget": 10**6}
    truth = torch.tensor([problem.optimum(p)[0] for p in problem.prompts], dtype=torch.float64)
    alone = replace(problem.task, prompts={"train": [problem.prompts[-1]]})
    for task, values in ((problem.task, truth), (alone, truth[-1:])):
        found = sandwich(task, "train", **options, generator=seeded(23))
        width = found.upper - found.lower  # an interval of 95 % misses now and then, but not by its own width
        assert width > 0
        assert found.lower - width < values.mean().item() < found.upper + width
        assert (found.method, found.exact, found.policy) == ("bounds", False, None)
        if proposal not in ("critic", "other"):
            assert width < 0.9
            torch.testing.assert_close(found.values, values, rtol=0, atol=0.25)


def test_the_references_are_the_scores_of_the_reference(problem: TinyProblem) -> None:
    for proposal in (None, CausalPolicy(near(problem))):
        found = sandwich(problem.task, "train", proposal=proposal, particles=50, repeats=10, generator=seeded(24))
        expected = [problem.objective(p, problem.token_log_probs(problem.lm, p).sum(1)) for p in problem.prompts]
        torch.testing.assert_close(found.references, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.08)
        assert found.reference < found.lower
        stored = found.stored()
        assert stored.reference_half_width == found.reference_half_width
        assert 0 < found.reference_half_width < 0.05
        assert abs(found.reference - sum(expected) / len(expected)) < 2 * found.reference_half_width


def test_without_a_highest_score_there_is_no_upper_bound(problem: TinyProblem) -> None:
    found = sandwich(problem.task, "train", particles=200, repeats=4, prompts=2, generator=seeded(25))
    assert found.upper == math.inf
    assert len(found.values) == len(found.references) == 2
    truth = [problem.optimum(p)[0] for p in problem.prompts[:2]]
    torch.testing.assert_close(
        found.values, torch.tensor(truth, dtype=torch.float64), rtol=0, atol=0.1
    )  # 5 standard errors
    assert found.lower < found.value


def test_the_optimum_is_never_said_to_pass_the_highest_score() -> None:
    """A constant score: V* is that score, and the upper bound cannot be any higher."""
    problem = TinyProblem()
    task = replace(problem.task, reward=lambda prompts, completions, **_: [0.25] * len(prompts))
    proposal = CausalPolicy(problem.other)
    found = sandwich(task, "train", proposal=proposal, particles=2, repeats=4, max_score=0.25, generator=seeded(26))
    assert found.upper == 0.25
    assert found.lower < 0.25


@pytest.mark.parametrize("changes", [{"gamma": 0.9}, {"kl_coef": 0.0}])
def test_other_objectives_have_no_such_bounds(problem: TinyProblem, changes: dict[str, float]) -> None:
    task = replace(problem.task, **changes)
    match = "`gamma` must be 1 for these bounds" if "gamma" in changes else "`kl_coef` must be > 0"
    with pytest.raises(InvalidArgumentError, match=match):
        sandwich(task, "train", generator=seeded(0))
    with pytest.raises(InvalidArgumentError, match=match):
        rejection_samples(task, "train", 1.0, 1, 10, seeded(0))
    with pytest.raises(InvalidArgumentError, match=match):
        smc(task, runs(problem, "x", 1), CausalPolicy(problem.lm), 2, seeded(0))


def test_arguments_are_checked(problem: TinyProblem) -> None:
    policy = CausalPolicy(problem.lm)
    ids = runs(problem, "x", 2)
    with pytest.raises(UnknownNameError, match="`split`"):
        sandwich(problem.task, "test", generator=seeded(0))
    with pytest.raises(InvalidArgumentError, match="`repeats` must be an int >= 2, got 1."):
        sandwich(problem.task, "train", repeats=1, generator=seeded(0))
    with pytest.raises(InvalidArgumentError, match="`particles` must be an int >= 1, got 0."):
        smc(problem.task, ids, policy, 0, seeded(0))
    with pytest.raises(InvalidArgumentError, match="`resample_at` must be a finite number >= 0 and <= 1, got 1.5."):
        smc(problem.task, ids, policy, 2, seeded(0), resample_at=1.5)
    with pytest.raises(InvalidArgumentError, match="`retained` must be 2 responses, one a prompt, got 1."):
        smc(problem.task, ids, policy, 2, seeded(0), retained=[(1,)])


def test_noise_is_taken_off_before_scores_are_weighed_or_is_refused() -> None:
    """With noise of 1 the wrong lower bound lies 1 / (2 kl_coef) above V*."""
    noise = NoisyReward(NoisyReward(table_reward, 0.8), 0.6)
    task = TinyProblem(reward=noise).task
    problem = TinyProblem()
    truth = sum(problem.optimum(prompt)[0] for prompt in problem.prompts) / 3
    clean, noisy = (
        sandwich(t, "train", particles=100, repeats=4, max_score=2.0, budget=5000, generator=seeded(30))
        for t in (problem.task, task)
    )
    assert torch.equal(noisy.values, clean.values)
    assert noisy.lower < truth < noisy.upper
    hidden = replace(task, reward=functools.partial(noise))
    for run in (
        lambda: sandwich(hidden, "train", particles=10, repeats=2, generator=seeded(31)),
        lambda: rejection_samples(hidden, "train", 9.0, 1, 100, seeded(31)),
    ):
        with pytest.raises(InvalidArgumentError, match="`reward` must have no noise .* gave one response two scores"):
            run()
