"""Grading policies whose grade is known by enumeration: the reference, another model, and the optimum itself."""

from __future__ import annotations

import functools
import math
from typing import Any

import gymnasium as gym
import pytest
import torch
from conftest import TinyProblem, shifted, table_reward, word_count
from torch import Tensor

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LogProbError
from lmgym.evaluation import Evaluation, as_json, evaluate
from lmgym.intervals import Interval
from lmgym.kl import episode_kl
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.optimum.bounds import log_weights, multi_sample_bound
from lmgym.rewards.base import remove_noise
from lmgym.rewards.noise import NoisyReward
from lmgym.rollout import collect


@pytest.fixture(scope="module")
def problem() -> TinyProblem:
    return TinyProblem(horizon=3)


def envs_of(problem: TinyProblem, **changes: Any) -> RLHFVectorEnv:
    envs = gym.make_vec("lmgym/RLHF-v0", num_envs=2, task=problem.task, **changes)
    assert isinstance(envs, RLHFVectorEnv)
    return envs


class Tabular:
    """A policy from a distribution over whole responses: pi(a | prefix) is the mass of what begins so."""

    device = torch.device("cpu")

    def __init__(self, problem: TinyProblem, log_probs: dict[str, Tensor]) -> None:
        self.problem = problem
        self.tokenizer = problem.lm.tokenizer
        self.mass: dict[tuple[str, tuple[int, ...]], float] = {}
        for prompt, log_pi in log_probs.items():
            for response, p in zip(problem.responses, log_pi.exp().tolist(), strict=True):
                for t in range(len(response) + 1):
                    key = (prompt, response[:t])
                    self.mass[key] = self.mass.get(key, 0.0) + p

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> TabularState:
        prompts = [self.tokenizer.decode(ids[mask]) for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        return TabularState(self, prompts)


class TabularState:
    values = None

    def __init__(self, policy: Tabular, prompts: list[str]) -> None:
        self.policy = policy
        self.rows = [(prompt, ()) for prompt in prompts]

    @property
    def logits(self) -> Tensor:
        masses = [
            [self.policy.mass.get((prompt, (*prefix, token)), 0.0) for token in range(6)]
            for prompt, prefix in self.rows
        ]
        flat = torch.tensor(masses, dtype=torch.float64)
        return torch.where(flat.sum(1, keepdim=True) > 0, flat, 1.0).log()  # after an end anything goes

    def step(self, tokens: Tensor) -> None:
        self.rows = [(prompt, (*prefix, int(i))) for (prompt, prefix), i in zip(self.rows, tokens, strict=True)]

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(shifted(seed))


def per_prompt(evaluation: Evaluation, x: Tensor) -> Tensor:
    return x.view(3, -1)


def test_the_reference_has_no_kl_and_earns_its_score(problem: TinyProblem) -> None:
    found = evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=200, generator=rng())
    metrics = found.metrics
    assert set(metrics) == {"return", "score", "kl", "length"}
    assert metrics["kl"].mean == pytest.approx(0, abs=1e-5)
    assert metrics["return"].mean == pytest.approx(metrics["score"].mean, abs=1e-5)
    for i, prompt in enumerate(problem.prompts):
        distribution = problem.token_log_probs(problem.lm, prompt).sum(1).exp()
        scores = problem.scores(prompt)
        mean = float((distribution * scores).sum())
        error = math.sqrt(float((distribution * (scores - mean) ** 2).sum()) / 200)
        assert abs(per_prompt(found, found.episodes.scores)[i].mean() - mean) < 4 * error
        lengths = torch.tensor([len(r) for r in problem.responses]).double()
        assert per_prompt(found, found.episodes.lengths.double())[i].mean() == pytest.approx(
            float((distribution * lengths).sum()), abs=0.3
        )


def test_the_optimum_earns_v_star_with_every_sample(problem: TinyProblem) -> None:
    """score - kl_coef * log(pi* / pi_ref) is V*(x) for every response: no variance at all."""
    optima = {prompt: problem.optimum(prompt) for prompt in problem.prompts}
    policy = Tabular(problem, {prompt: log_pi for prompt, (_, log_pi) in optima.items()})
    found = evaluate(policy, envs_of(problem), samples=40, generator=rng())
    values = torch.tensor([value for value, _ in optima.values()])
    returns = found.episodes.scores - problem.kl_coef * episode_kl(found.episodes)
    torch.testing.assert_close(per_prompt(found, returns), values[:, None].expand(3, 40), rtol=0, atol=1e-4)
    assert found.metrics["return"].mean == pytest.approx(values.mean().item(), abs=1e-4)
    assert found.bound is not None
    assert found.bound.mean == pytest.approx(values.mean().item(), abs=1e-4)
    reference = evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=40, generator=rng())
    optimum = values.mean().item()
    assert found.metrics["return"].high == pytest.approx(optimum, abs=1e-4)
    assert reference.metrics["return"].high < optimum


def test_any_policy_lies_below_the_optimum_and_its_bound_between(problem: TinyProblem) -> None:
    found = evaluate(CausalPolicy(problem.other), envs_of(problem), samples=600, generator=rng(1))
    returns = per_prompt(found, found.episodes.scores - problem.kl_coef * episode_kl(found.episodes))
    optimum = 0.0
    for i, prompt in enumerate(problem.prompts):
        log_pi = problem.token_log_probs(problem.other, prompt).sum(1)
        error = returns[i].std() / math.sqrt(600)
        assert abs(returns[i].mean() - problem.objective(prompt, log_pi)) < 4 * error
        optimum += problem.optimum(prompt)[0] / 3
    assert found.metrics["kl"].mean > 0.1
    assert found.bound is not None
    assert found.metrics["return"].mean < found.bound.mean < optimum + 0.02


def test_prompts_come_in_order_with_their_samples_together(problem: TinyProblem) -> None:
    envs = envs_of(problem)
    found = evaluate(CausalPolicy(problem.lm), envs, samples=2, generator=rng())
    assert found.episodes.prompt_index.tolist() == [0, 0, 1, 1, 2, 2]
    two = evaluate(CausalPolicy(problem.lm), envs, samples=2, prompts=2, generator=rng())
    assert two.episodes.prompt_index.tolist() == [0, 0, 1, 1]
    many = evaluate(CausalPolicy(problem.lm), envs, samples=1, prompts=99, generator=rng())
    assert len(many.episodes) == 3
    with pytest.raises(InvalidArgumentError, match="`samples` must be an int >= 1, got 0."):
        evaluate(CausalPolicy(problem.lm), envs, samples=0)


def test_batches_do_not_matter(problem: TinyProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 x 20 episodes at once, or 7 at a time: the uniforms are drawn in the same order."""
    envs = envs_of(problem)
    whole = evaluate(CausalPolicy(problem.lm), envs, samples=20, generator=rng(2))
    monkeypatch.setattr("lmgym.evaluation._BATCH_SIZE", 7)
    parts = evaluate(CausalPolicy(problem.lm), envs, samples=20, generator=rng(2))
    assert torch.equal(whole.episodes.response_ids, parts.episodes.response_ids)
    assert parts.metrics["return"].mean == pytest.approx(whole.metrics["return"].mean, abs=1e-6)


def test_without_a_price_there_is_neither_kl_nor_bound(problem: TinyProblem) -> None:
    found = evaluate(CausalPolicy(problem.other), envs_of(problem, kl_coef=0.0), samples=5, generator=rng())
    assert set(found.metrics) == {"return", "score", "length"}
    assert found.bound is None
    assert found.metrics["return"] == found.metrics["score"]


def test_a_discount_counts_in_the_return(problem: TinyProblem) -> None:
    found = evaluate(CausalPolicy(problem.other), envs_of(problem, gamma=0.5), samples=5, generator=rng())
    assert found.bound is None
    episodes = found.episodes
    slow = []
    for i in range(len(episodes)):
        last = int(episodes.lengths[i]) - 1
        costs = problem.kl_coef * (episodes.log_probs[i] - episodes.ref_log_probs[i])
        slow.append(0.5**last * float(episodes.scores[i]) - sum(0.5**t * float(costs[t]) for t in range(last + 1)))
    assert found.metrics["return"].mean == pytest.approx(sum(slow) / len(slow), abs=1e-5)


def test_the_gold_score_is_graded_too() -> None:
    problem = TinyProblem(horizon=2, gold=word_count)
    found = evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=4, generator=rng())
    assert found.episodes.gold_scores is not None
    assert found.metrics["gold_score"].mean == pytest.approx(found.episodes.gold_scores.mean().item())


def test_the_distribution_graded_is_that_of_the_sampler(problem: TinyProblem) -> None:
    envs = envs_of(problem)
    greedy = evaluate(CausalPolicy(problem.lm), envs, samples=3, sampler=Sampler(temperature=0), generator=rng())
    assert (greedy.episodes.log_probs == 0).all()
    assert greedy.metrics["kl"].mean > 0.5  # a point mass is far from the reference
    assert (per_prompt(greedy, greedy.episodes.scores).std(1) == 0).all()


def test_log_probs_of_another_distribution_are_a_loud_error(
    problem: TinyProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a sampler that forgets its temperature."""
    forgetful = Sampler(temperature=1.7)
    monkeypatch.setattr(
        Sampler, "sample",
        lambda self, logits, t, u: (torch.multinomial((logits / 1.7).softmax(-1), 1).squeeze(1), logits.amin(-1)),
    )  # fmt: skip
    with pytest.raises(LogProbError, match="a KL is never negative"):
        evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=50, sampler=forgetful, generator=rng())


def test_json_is_plain_numbers() -> None:
    assert as_json({"score": Interval(1.0, 0.5, 1.5)}) == {"score": {"mean": 1.0, "low": 0.5, "high": 1.5}}


# --- rewards with noise -----------------------------------------------------------------------------------------------


class Doubled:
    """A user's composition around a noisy reward, which says what it pays on average."""

    def __init__(self, inside: NoisyReward) -> None:
        self.inside = inside

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [2 * x for x in self.inside(prompts, completions, **columns)]

    def expected(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [2 * x for x in remove_noise(self.inside)(prompts, completions, **columns)]


def halved(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [x / 2 for x in table_reward(prompts, completions, **columns)]


NOISY = {
    "noise": NoisyReward(table_reward, 1.0),
    "noise on noise": NoisyReward(NoisyReward(NoisyReward(table_reward, 0.5), 0.5), 0.8),
    "a composition": Doubled(NoisyReward(halved, 0.5)),
    "noise on a composition": NoisyReward(Doubled(NoisyReward(halved, 0.5)), 0.5),
}


@pytest.mark.parametrize("name", NOISY)
def test_a_noisy_reward_is_graded_by_what_it_pays_on_average(name: str) -> None:
    problem = TinyProblem(horizon=3, reward=NOISY[name])
    envs = envs_of(problem)
    found = evaluate(CausalPolicy(problem.lm), envs, samples=60, generator=rng())
    episodes = found.episodes
    metrics = found.metrics
    lengths = zip(episodes.response_ids.tolist(), episodes.lengths.tolist(), strict=True)
    texts = [problem.prompts[i] for i in episodes.prompt_index.tolist()]
    expected = table_reward(texts, [""] * len(texts), [row[:n] for row, n in lengths])
    assert episodes.scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics["score"].mean == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert metrics["return"].mean == pytest.approx(metrics["score"].mean, abs=1e-5)  # of the reference
    assert abs(metrics["sampled_score"].mean - metrics["score"].mean) > 1e-3
    widths = [metrics[which].high - metrics[which].low for which in ("score", "sampled_score")]
    assert widths[1] > 1.5 * widths[0]


def test_noise_is_not_counted_as_gain() -> None:
    """Noise of standard deviation 1 adds 1 / (2 kl_coef) to a bound that weighs scores as they were drawn."""
    problem = TinyProblem(horizon=3, reward=NoisyReward(table_reward, 1.0))
    envs = envs_of(problem)
    found = evaluate(CausalPolicy(problem.lm), envs, samples=600, generator=rng())
    optimum = sum(problem.optimum(prompt)[0] for prompt in problem.prompts) / 3
    assert found.bound is not None
    assert optimum - 0.1 < found.bound.mean < optimum + 0.02
    prompts = [envs.engine.prompts[i] for i in range(3) for _ in range(600)]
    drawn = collect(envs, CausalPolicy(problem.lm), prompts, generator=rng())
    wrong = multi_sample_bound(log_weights(drawn, problem.kl_coef).view(3, 600), problem.kl_coef)
    assert wrong.mean().item() > optimum + 0.5


def test_of_noise_whose_mean_is_not_known_there_is_no_bound_but_a_reason() -> None:
    noise = NoisyReward(table_reward, 1.0)
    partial = functools.partial(noise)  # hides `expected`
    problem = TinyProblem(horizon=3, reward=partial)
    found = evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=4, generator=rng())
    assert found.bound is None
    assert found.no_bound is not None
    assert "gave one response two scores" in found.no_bound
    assert "`expected`" in found.no_bound
    assert "sampled_score" not in found.metrics
    exact = evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=4, generator=rng(), exact=True)
    assert exact.no_bound == found.no_bound
    assert not exact.metrics["return"].exact


def test_noise_on_one_response_in_a_hundred_is_noticed() -> None:
    calls = []

    def moody(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(prompts))
        scores = table_reward(prompts, completions, **columns)
        return [x + (i % 100 == 7) * 0.001 * len(calls) for i, x in enumerate(scores)]

    problem = TinyProblem(horizon=3, reward=moody)
    found = evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=60, generator=rng())
    assert found.bound is None


def test_every_reason_for_no_bound_is_said(problem: TinyProblem) -> None:
    policy = CausalPolicy(problem.lm)
    for changes, samples, reason in (
        ({"kl_coef": 0.0}, 2, "at `kl_coef=0` it is the largest score"),
        ({"gamma": 0.9}, 2, "a bound from samples holds at `gamma=1` alone"),
        ({}, 1, "it takes more than one sample a prompt to bound it"),
        ({}, 2, None),
    ):
        found = evaluate(policy, envs_of(problem, **changes), samples=samples, generator=rng())
        assert found.no_bound == reason
        assert (found.bound is None) == (reason is not None)


def test_a_noisy_gold_reward_is_graded_by_its_mean() -> None:
    problem = TinyProblem(horizon=2, gold=NoisyReward(NoisyReward(word_count, 1.0), 1.0))
    clean = TinyProblem(horizon=2, gold=word_count)
    both = [evaluate(CausalPolicy(p.lm), envs_of(p), samples=4, generator=rng()).metrics for p in (problem, clean)]
    assert both[0]["gold_score"].mean == pytest.approx(both[1]["gold_score"].mean, abs=1e-6)
    assert both[0]["score"] == both[1]["score"]
    assert "sampled_score" not in both[0]


def test_the_noise_of_a_grade_is_of_its_generator_and_leaves_that_of_the_env_alone() -> None:
    noise = NoisyReward(NoisyReward(table_reward, 1.0), 1.0)
    problem = TinyProblem(horizon=2, reward=noise)
    envs = envs_of(problem)
    state = noise.get_state()
    policy = CausalPolicy(problem.lm)
    first, again, other = (evaluate(policy, envs, samples=4, generator=rng(seed)).metrics for seed in (0, 0, 1))
    assert noise.get_state() == state
    assert first == again
    assert first["sampled_score"] != other["sampled_score"]


def test_no_row_of_the_env_is_touched(problem: TinyProblem) -> None:
    envs = envs_of(problem)
    first, _ = envs.reset(seed=0)
    episodes: Episodes = evaluate(CausalPolicy(problem.lm), envs, samples=2, generator=rng()).episodes
    assert len(episodes) == 6
    again, *_ = envs.step([3, 4])
    assert (again["attention_mask"].sum(1) == first["attention_mask"].sum(1) + 1).all()


def test_the_interval_is_of_the_sampling_where_all_prompts_are_graded(problem: TinyProblem) -> None:
    found = evaluate(CausalPolicy(problem.lm), envs_of(problem), samples=50, generator=rng())
    scores = per_prompt(found, found.episodes.scores.double())
    assert_close(found.metrics["score"], Interval.over_repeats(scores))


def test_the_interval_is_over_prompts_where_only_some_are_graded_or_once(problem: TinyProblem) -> None:
    def score_all_differently(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """So that no score is rare, whatever the model writes."""
        ids = columns["completion_ids"]
        return [
            0.01 * len(p) + sum(0.001 * (t + 1) * a for t, a in enumerate(c)) for p, c in zip(prompts, ids, strict=True)
        ]

    for few in ({"samples": 50, "prompts": 2}, {"samples": 1}):
        envs = envs_of(problem, reward=score_all_differently)
        found = evaluate(CausalPolicy(problem.lm), envs, generator=rng(), **few)
        means = found.episodes.scores.view(few.get("prompts", 3), -1).mean(1)
        assert_close(found.metrics["score"], Interval.of(means))


def assert_close(found: Interval, expected: Interval) -> None:
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-5)


def test_the_episodes_of_a_grading_are_counted_as_they_come(problem: TinyProblem) -> None:
    counts: list[int] = []
    envs = envs_of(problem)
    evaluate(CausalPolicy(problem.lm), envs, samples=200, generator=rng(), progress=counts.append)
    assert sum(counts) == 200 * len(problem.prompts)
    assert len(counts) > 1
