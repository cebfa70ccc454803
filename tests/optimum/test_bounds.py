"""The optimum and its sampling bound on a problem whose responses can all be written down."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import TinyProblem
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import inverse_cdf
from lmgym.optimum.bounds import Mixture, log_weights, multi_sample_bound


@pytest.fixture(scope="module")
def problem() -> TinyProblem:
    return TinyProblem(horizon=2)


def all_episodes(problem: TinyProblem, prompt: str, log_probs: Tensor) -> Episodes:
    """Every response once, as if a policy with (R, T) token log-probs had drawn it."""
    rows = len(problem.responses)
    lengths = torch.tensor([len(r) for r in problem.responses])
    return Episodes(
        prompt_ids=torch.zeros((rows, 1), dtype=torch.int64),
        prompt_mask=torch.ones((rows, 1), dtype=torch.bool),
        response_ids=torch.zeros((rows, problem.T), dtype=torch.int64),
        response_mask=torch.arange(problem.T) < lengths[:, None],
        log_probs=log_probs,
        ref_log_probs=problem.token_log_probs(problem.lm, prompt),
        scores=problem.scores(prompt),
        values=None,
        terminated=torch.ones(rows, dtype=torch.bool),
        prompt_index=torch.zeros(rows, dtype=torch.int64),
    )


def test_the_responses_are_all_there_are(problem: TinyProblem) -> None:
    assert len(problem.responses) == len(set(problem.responses)) == 1 + 5 * 6
    for lm in (problem.lm, problem.other):
        for prompt in problem.prompts:
            assert problem.token_log_probs(lm, prompt).sum(1).exp().sum() == pytest.approx(1, abs=1e-6)


def test_the_gap_to_the_optimum_is_the_kl_to_it(problem: TinyProblem) -> None:
    """V* - J(pi) = kl_coef * KL(pi || pi*) >= 0, for every policy."""
    for prompt in problem.prompts:
        value, optimal = problem.optimum(prompt)
        assert optimal.exp().sum() == pytest.approx(1, abs=1e-6)
        assert problem.objective(prompt, optimal) == pytest.approx(value, abs=1e-6)
        for lm in (problem.lm, problem.other):
            log_pi = problem.token_log_probs(lm, prompt).sum(1)
            gap = problem.kl_coef * float((log_pi.exp() * (log_pi - optimal)).sum())
            assert gap > 0.01
            assert value - problem.objective(prompt, log_pi) == pytest.approx(gap, abs=1e-6)
            wrong_way = problem.kl_coef * float((optimal.exp() * (optimal - log_pi)).sum())
            assert abs(wrong_way - gap) > 1e-3


def test_log_weights_are_those_of_the_design(problem: TinyProblem) -> None:
    for prompt in problem.prompts:
        log_probs = problem.token_log_probs(problem.other, prompt)
        found = log_weights(all_episodes(problem, prompt, log_probs), problem.kl_coef)
        ratio = problem.token_log_probs(problem.lm, prompt).sum(1) - log_probs.sum(1)
        torch.testing.assert_close(found, ratio + problem.scores(prompt) / problem.kl_coef)
        # Importance weights: their mean under the policy is that of exp(score / kl_coef) under the reference.
        mean = (log_probs.sum(1).exp() * found.exp()).sum().log() * problem.kl_coef
        assert mean == pytest.approx(problem.optimum(prompt)[0], abs=1e-6)


def expected_bound(problem: TinyProblem, prompt: str, weights: Tensor, log_pi: Tensor, n: int) -> float:
    """E of the bound over all R^n tuples of responses of a policy."""
    tuples = torch.tensor(list(itertools.product(range(len(log_pi)), repeat=n)))
    probability = log_pi[tuples].sum(1).exp()
    return float((probability * multi_sample_bound(weights[tuples], problem.kl_coef)).sum())


def test_the_bound_is_j_at_one_sample_then_grows_and_never_passes_the_optimum(problem: TinyProblem) -> None:
    for prompt in problem.prompts:
        value, _ = problem.optimum(prompt)
        for lm in (problem.lm, problem.other):
            log_probs = problem.token_log_probs(lm, prompt)
            weights = log_weights(all_episodes(problem, prompt, log_probs), problem.kl_coef)
            log_pi = log_probs.sum(1)
            bounds = [expected_bound(problem, prompt, weights, log_pi, n) for n in (1, 2, 3)]
            assert bounds[0] == pytest.approx(problem.objective(prompt, log_pi), abs=1e-6)
            assert bounds[0] + 1e-3 < bounds[1] < bounds[2] < value


def test_the_bound_is_exact_at_the_optimum(problem: TinyProblem) -> None:
    """Every weight is V* / kl_coef there: no sample is luckier than another."""
    for prompt in problem.prompts:
        value, optimal = problem.optimum(prompt)
        log_probs = torch.zeros((len(optimal), problem.T), dtype=torch.float64)
        log_probs[:, 0] = optimal
        weights = log_weights(all_episodes(problem, prompt, log_probs), problem.kl_coef)
        torch.testing.assert_close(weights, torch.full_like(weights, value / problem.kl_coef), rtol=0, atol=1e-6)
        samples = weights[torch.randint(len(weights), (5, 12), generator=torch.Generator().manual_seed(0))]
        for n in (1, 3, 12):
            found = multi_sample_bound(samples, problem.kl_coef, n)
            torch.testing.assert_close(found, torch.full((5,), value, dtype=torch.float64), rtol=0, atol=1e-6)


def test_samples_are_taken_in_disjoint_groups() -> None:
    weights = 3 * torch.randn((4, 12), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = -math.inf
    for n in (1, 2, 3, 4, 6, 12):
        slow = []
        for row in weights.tolist():
            groups = [row[start : start + n] for start in range(0, 12, n)]
            slow.append(sum(0.3 * math.log(sum(math.exp(w) for w in g) / n) for g in groups) / len(groups))
        found = multi_sample_bound(weights, 0.3, n)
        torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64))
        if n in (1, 2, 4, 12):  # each a union of groups of the one before: it can only grow
            assert float(found.mean()) >= before
            before = float(found.mean())
    torch.testing.assert_close(multi_sample_bound(weights, 0.3), multi_sample_bound(weights, 0.3, 12))
    huge = multi_sample_bound(torch.tensor([[2000.0, 1000.0]]), 0.5)
    assert huge.item() == pytest.approx(0.5 * (2000 - math.log(2)))


@pytest.mark.parametrize("n", [0, -1, 5, 24])
def test_a_group_size_that_does_not_divide_is_refused(n: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`n` must divide the 12 samples of a prompt, got {n}."):
        multi_sample_bound(torch.zeros((2, 12)), 0.3, n)


def test_without_a_price_there_is_no_bound(problem: TinyProblem) -> None:
    episodes = all_episodes(problem, "x", problem.token_log_probs(problem.lm, "x"))
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0 for a bound on the optimum, got 0.0."):
        log_weights(episodes, 0.0)


def mixture_of(problem: TinyProblem) -> Mixture:
    return Mixture([CausalPolicy(problem.lm), CausalPolicy(problem.other)], [0.3, 0.7])


def test_a_mixture_gives_a_whole_response_the_average_of_its_components(problem: TinyProblem) -> None:
    """log q(y) = log sum_k w_k q_k(y), for all responses there are: not the average of each token."""
    for prompt in problem.prompts:
        ids = torch.tensor([problem.lm.encode(prompt)] * len(problem.responses))
        state = mixture_of(problem).begin(ids, torch.ones_like(ids, dtype=torch.bool), problem.T)
        found = torch.zeros(len(problem.responses), dtype=torch.float64)
        token_by_token = found.clone()
        padded = torch.tensor([[*r, *[0] * (problem.T - len(r))] for r in problem.responses])
        running = torch.tensor([[t < len(r) for t in range(problem.T)] for r in problem.responses])
        for t in range(problem.T):
            chosen = state.logits.log_softmax(-1).gather(1, padded[:, t : t + 1]).squeeze(1)
            torch.testing.assert_close(state.logits.exp().sum(1), torch.ones(len(ids), dtype=torch.float64))
            found += torch.where(running[:, t], chosen, 0.0)
            state.step(padded[:, t])
        components = [problem.token_log_probs(lm, prompt) for lm in (problem.lm, problem.other)]
        expected = (0.3 * components[0].sum(1).exp() + 0.7 * components[1].sum(1).exp()).log()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for t in range(problem.T):
            token_by_token += (0.3 * components[0][:, t].exp() + 0.7 * components[1][:, t].exp()).log()
        assert (token_by_token - expected).abs().max() > 1e-2


def test_a_mixture_keeps_and_restarts_its_rows(problem: TinyProblem) -> None:
    ids = torch.tensor([[3, 4], [4, 5], [5, 5]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    state = mixture_of(problem).begin(ids, mask, 3)
    state.step(torch.tensor([0, 3, 4]))
    before = state.logits
    shares = state.shares
    assert (shares.exp().sum(1) - 1).abs().max() < 1e-12
    assert (shares[0] - shares[1]).abs().max() > 1e-2
    state.keep(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(state.logits, before[[2, 0, 0]])
    state.begin(torch.tensor([1]), ids[1:2], mask[1:2])
    fresh = mixture_of(problem).begin(ids, mask, 3)
    torch.testing.assert_close(state.logits[1], fresh.logits[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(state.logits[[0, 2]], before[[2, 0]])


def test_a_mixture_draws_each_component_as_often_as_its_weight() -> None:
    """Token by token or a component first: the same distribution of whole responses."""
    problem = TinyProblem(horizon=2)
    n = 5000
    ids = torch.tensor([problem.lm.encode("x")])
    state = mixture_of(problem).begin(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    state.keep(torch.zeros(n, dtype=torch.int64))
    uniforms = torch.rand((n, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, _ = inverse_cdf(state.logits.float(), uniforms[:, 0])
    state.step(first)
    second, _ = inverse_cdf(state.logits.float(), uniforms[:, 1])
    log_pi = sum(
        w * problem.token_log_probs(lm, "x").sum(1).exp() for w, lm in ((0.3, problem.lm), (0.7, problem.other))
    )
    for response, p in zip(problem.responses, log_pi.tolist(), strict=True):
        drawn = first == response[0]
        if len(response) > 1:
            drawn &= second == response[1]
        assert abs(int(drawn.sum()) - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1


def test_a_mixture_has_the_values_of_the_first_component_with_any(problem: TinyProblem) -> None:
    head = torch.nn.Linear(32, 1)
    ids = torch.tensor([[3, 4]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    critic = CausalPolicy(problem.other, head)
    state = Mixture([CausalPolicy(problem.lm), critic], [0.5, 0.5]).begin(ids, mask, 2)
    torch.testing.assert_close(state.values, critic.begin(ids, mask, 2).values)
    assert mixture_of(problem).begin(ids, mask, 2).values is None


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [1.0, 0.0], [1.5, -0.5], []])
def test_weights_that_are_no_mixture_are_refused(problem: TinyProblem, weights: list[float]) -> None:
    with pytest.raises(InvalidArgumentError, match="`weights` must be 2 numbers > 0 that sum to 1, one a policy, got"):
        Mixture([CausalPolicy(problem.lm), CausalPolicy(problem.other)], weights)
