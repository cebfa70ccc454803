"""Bounds by importance sampling, against the optimum where every response can be written down."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import pytest
import torch
from conftest import TinyProblem
from torch import Tensor

from agents.algorithms.ppo import PPO, PPOConfig
from builders.proposal import effective_size, fit_proposal, resample
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.evaluation import evaluate
from lmgym.models.policy import CausalPolicy
from lmgym.optimum import importance, solve
from lmgym.optimum.answer import Optimum
from lmgym.optimum.bounds import Mixture, multi_sample_bound, multi_sample_upper_bound
from lmgym.optimum.importance import importance_bounds, price, share_above
from lmgym.optimum.rejection import Accepted, accept
from lmgym.optimum.smc import smc
from lmgym.tasks import Task

COUNT = 20  # derivations, each with a seed of its own


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def problem() -> TinyProblem:
    return TinyProblem(horizon=2)


def proposal_of(problem: TinyProblem) -> Mixture:
    return Mixture([CausalPolicy(problem.other), CausalPolicy(problem.lm)], [0.7, 0.3])


def distributions(problem: TinyProblem, prompt: str) -> tuple[Tensor, Tensor]:
    """(R,) log q and log w of every response under the mixture."""
    parts = [problem.token_log_probs(lm, prompt).sum(1) for lm in (problem.other, problem.lm)]
    log_q = torch.logaddexp(parts[0] + math.log(0.7), parts[1] + math.log(0.3))
    return log_q, parts[1] - log_q + problem.scores(prompt) / problem.kl_coef


def truth(problem: TinyProblem) -> float:
    """V*, the mean over prompts."""
    return sum(problem.optimum(prompt)[0] for prompt in problem.prompts) / len(problem.prompts)


# -- the formulas, over all tuples of responses ----------------------------------------------------------------------


def test_the_upper_bound_is_above_and_falls_with_the_samples(problem: TinyProblem) -> None:
    for prompt in problem.prompts:
        value, optimal = problem.optimum(prompt)
        log_q, log_w = distributions(problem, prompt)
        rows = range(len(log_q))
        upper = []
        wrong = []
        lower = []
        for n in (1, 2, 3):
            tuples = torch.tensor(list(itertools.product(rows, repeat=n)))
            weights = log_w[tuples]
            rest = log_q[tuples[:, 1:]].sum(1)
            bound = multi_sample_upper_bound(weights, weights[:, 0], problem.kl_coef)
            upper.append(float(((optimal[tuples[:, 0]] + rest).exp() * bound).sum()))
            wrong.append(float(((log_q[tuples[:, 0]] + rest).exp() * bound).sum()))
            lower.append(float((log_q[tuples].sum(1).exp() * multi_sample_bound(weights, problem.kl_coef)).sum()))
        assert upper[0] > upper[1] > upper[2] > value + 1e-3
        assert wrong == pytest.approx(lower)  # a draw of the proposal instead of one of pi*
        assert max(wrong) < value - 1e-3


def test_the_upper_bound_replaces_the_first_of_the_weights() -> None:
    weights = torch.randn((2, 3, 5), generator=seeded(0), dtype=torch.float64)
    exact = torch.randn((2, 3), generator=seeded(1), dtype=torch.float64)
    found = multi_sample_upper_bound(weights, exact, 0.3)
    for x, r in itertools.product(range(2), range(3)):
        total = math.exp(exact[x, r]) + sum(math.exp(w) for w in weights[x, r, 1:].tolist())
        assert found[x, r].item() == pytest.approx(0.3 * math.log(total / 5))


@pytest.mark.parametrize("clipped", [False, True])
def test_what_is_accepted_has_the_clipped_distribution(problem: TinyProblem, clipped: bool) -> None:
    """q min(w, cap), which is pi* where no weight is above the cap."""
    n = 600
    prompt_ids = [problem.lm.encode(prompt) for prompt in problem.prompts]
    log_weights = torch.stack([distributions(problem, prompt)[1] for prompt in problem.prompts])
    log_caps = log_weights.quantile(0.7, dim=1) if clipped else log_weights.amax(1) + 1e-4
    found = accept(problem.task, prompt_ids, proposal_of(problem), log_caps, n, 10**5, seeded(2))
    assert (found.excess > 0).tolist() == [clipped] * 3
    for x, prompt in enumerate(problem.prompts):
        log_q, log_w = distributions(problem, prompt)
        distribution = (log_q + log_w.clamp(max=log_caps[x].item())).softmax(0)
        distance = (distribution - problem.optimum(prompt)[1].exp()).abs().sum()
        assert distance > 0.1 if clipped else distance < 1e-5
        rows = [problem.responses.index(response) for response in found.responses[x]]
        assert len(rows) == n
        for i, p in enumerate(distribution.tolist()):
            assert abs(rows.count(i) - n * p) <= 4.5 * math.sqrt(n * p * (1 - p)) + 1
        said = torch.tensor(found.log_weights[x], dtype=torch.float64)
        torch.testing.assert_close(said, log_w[rows], rtol=0, atol=1e-5)


def test_the_share_above_the_caps_is_that_of_a_loop() -> None:
    weights = 2 * torch.randn((3, 2, 4), generator=seeded(3), dtype=torch.float64)
    caps = torch.tensor([0.5, 1.5, 99.0], dtype=torch.float64)
    shares = []
    for x in range(3):
        flat = [math.exp(w) for w in weights[x].flatten().tolist()]
        shares.append(sum(max(0.0, w - math.exp(caps[x])) for w in flat) / sum(flat))
    assert shares[0] > shares[2] == 0
    assert share_above(weights, caps) == pytest.approx(sum(shares) / 3)


# -- whole derivations ------------------------------------------------------------------------------------------------


def derive(problem: TinyProblem, seed: int, draws: int, repeats: int) -> Optimum:
    """Ratios up to 60, which is above all there are."""
    return importance_bounds(
        problem.task,
        "train",
        proposal_of(problem),
        draws=draws,
        repeats=repeats,
        pilot_draws=64,
        max_ratio=60.0,
        reference_draws=2,
        generator=seeded(seed),
    )


@pytest.mark.slow
def test_both_bounds_hold_as_often_as_they_say() -> None:
    """Each end may fail in one of 40; and both are near."""
    problem = TinyProblem(horizon=2, kl_coef=0.2)
    value = truth(problem)
    found = [derive(problem, seed, draws=32, repeats=4) for seed in range(COUNT)]
    assert not any(optimum.exact for optimum in found)
    assert sum(optimum.lower <= value for optimum in found) >= 0.9 * COUNT
    assert sum(value <= optimum.upper for optimum in found) >= 0.9 * COUNT
    assert sum(optimum.upper - optimum.lower for optimum in found) / COUNT < 0.3


def test_draws_of_the_proposal_instead_of_those_of_the_optimum_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The upper side then is a lower one, and fails nearly always: the test above would see it."""
    problem = TinyProblem(horizon=2, kl_coef=0.2)
    value = truth(problem)

    def keep_all(task: Task, prompt_ids: Any, proposal: Any, log_caps: Tensor, *rest: Any) -> Accepted:
        return accept(task, prompt_ids, proposal, torch.full_like(log_caps, -math.inf), *rest)

    monkeypatch.setattr(importance, "accept", keep_all)
    found = [derive(problem, seed, draws=2, repeats=64) for seed in range(5)]
    assert sum(value <= optimum.upper for optimum in found) <= 1


def test_the_price_covers_what_the_assumption_misses() -> None:
    """With caps far too low, the upper side plus -b log(1 - eps) still is one; without it, it need not be."""
    problem = TinyProblem(horizon=2, kl_coef=0.2)
    for prompt in problem.prompts:
        value, optimal = problem.optimum(prompt)
        log_q, log_w = distributions(problem, prompt)
        cap = log_w.sort().values[-2].item()
        missed = float(optimal.exp()[log_w > cap].sum())
        clipped = problem.kl_coef * float((log_q + log_w.clamp(max=cap)).logsumexp(0))
        assert 0.02 < missed < 0.99
        assert clipped < value <= clipped + price(problem.kl_coef, missed)


@pytest.mark.slow
def test_what_the_draws_show_to_be_cut_off_is_part_of_the_upper_bound() -> None:
    """With a cap that cuts off a good part of pi*, the price of that part keeps the upper side above V*."""
    problem = TinyProblem(horizon=2, kl_coef=0.2)
    value = truth(problem)
    caps = {"max_ratio": 1.2, "draws": 64, "repeats": 4, "reference_draws": 2, "pilot_draws": 64}
    found = [
        importance_bounds(problem.task, "train", proposal_of(problem), generator=seeded(seed), **caps)
        for seed in range(COUNT)
    ]
    assert sum(value <= optimum.upper for optimum in found) >= 0.9 * COUNT
    shares = [float(optimum.assumption.split("which takes ")[1].split(" %")[0]) / 100 for optimum in found]
    assert min(shares) > 0.05


def test_an_optimum_says_what_it_takes_for_granted(problem: TinyProblem) -> None:
    found = importance_bounds(problem.task, "train", proposal_of(problem), max_ratio=50.0, generator=seeded(4))
    assert found.method == "importance"
    assert "above 50 times the mean" in found.assumption
    assert f"{-problem.kl_coef * math.log(0.5):.3f}" in found.assumption
    stored = found.stored()
    assert stored.assumption == found.assumption
    assert 0.001 < stored.reference_half_width < 0.1
    assert stored.width == pytest.approx((found.upper - found.lower) / (found.value - found.reference))
    references = [float((problem.token_log_probs(problem.lm, p).sum(1).exp() * problem.scores(p)).sum())
                  for p in problem.prompts]  # fmt: skip
    torch.testing.assert_close(found.references, torch.tensor(references, dtype=torch.float64), rtol=0, atol=0.2)


def test_what_cannot_be_is_refused(problem: TinyProblem) -> None:
    for name, value in (("draws", 1), ("repeats", 1), ("pilot_draws", 0), ("max_ratio", 0.5), ("reference_draws", 1)):
        with pytest.raises(InvalidArgumentError, match=f"`{name}` must be"):
            importance_bounds(problem.task, "train", proposal_of(problem), generator=seeded(0), **{name: value})
    with pytest.raises(LmGymError, match=r"`budget` must give every prompt 2 samples .* `max_ratio`"):
        importance_bounds(problem.task, "train", proposal_of(problem), max_ratio=1e6, budget=20, generator=seeded(0))


@pytest.mark.slow
def test_an_agent_that_has_learned_stays_below_the_upper_bound() -> None:
    """PPO comes near V*, and the upper bound, from draws of the reference alone, is above it."""
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=16, task="anchor-0.3", device="cpu")
    agent = PPO(envs, PPOConfig(), seed=0)
    agent.learn(10_000)
    proposal = CausalPolicy(envs.engine.lm)
    found = importance_bounds(envs.task, "test", proposal, draws=64, max_ratio=20.0, generator=seeded(10))
    graded: Any = gym.make_vec("lmgym/RLHF-v0", task="anchor-0.3", split="test", device="cpu")
    returned = evaluate(agent.policy, graded, samples=64, generator=seeded(11)).metrics["return"]
    assert found.lower < solve(envs.task).value < found.upper
    assert returned.low < found.upper
    assert returned.mean > found.reference + 0.5 * (found.value - found.reference)


# -- the proposal ----------------------------------------------------------------------------------------------------


def test_resampling_flattens_until_enough_draws_count() -> None:
    weights = 30 * torch.randn((50, 64), generator=seeded(5), dtype=torch.float64)
    assert effective_size(weights).mean() < 2
    columns = resample(weights, 8, seeded(6))
    assert columns.shape == (50, 8)
    assert 3 < sum(len(set(row)) for row in columns.tolist()) / 50 <= 8
    even = torch.zeros((2, 64), dtype=torch.float64)
    assert torch.equal(resample(even, 8, seeded(7)) // 8, torch.arange(8).expand(2, 8))  # one of each stratum


@pytest.mark.slow
def test_a_fitted_proposal_has_more_even_weights_than_the_reference() -> None:
    problem = TinyProblem(horizon=3, kl_coef=0.1)
    fitted = fit_proposal(problem.task, seeded(8), rounds=2, prompts=48)
    assert fitted.weights == pytest.approx((0.8, 0.2))
    prompt_ids = [problem.lm.encode(prompt) for prompt in problem.prompts]
    sizes = []
    for policy in (CausalPolicy(problem.lm), fitted):
        got = smc(problem.task, prompt_ids, policy, 400, seeded(9), resample_at=0)
        sizes.append(effective_size(got.log_weights).mean().item())
    assert sizes[1] > 2 * sizes[0]
