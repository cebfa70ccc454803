"""Agents that do not learn: what they act by, and the best of n against enumeration of every response."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TinyProblem, shifted, table_reward
from hydra import compose, initialize_config_dir

import agents.train  # noqa: F401  has Hydra read conf as the commands do
from agents.algorithms.best_of_n import BestOfN, BestOfNConfig, best_of_n_log_probs, kl_bound, log_ratio_of_best
from agents.algorithms.medium import Medium, MediumConfig, return_of_optimum
from agents.algorithms.optimal import Optimal
from agents.algorithms.reference import Reference
from agents.algorithms.uniform import Uniform
from agents.fixed import FixedAgent
from agents.runs.grading import grade
from agents.runs.plan import check
from agents.runs.run import train
from agents.seeds import EVALUATION, torch_generator
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.evaluation import evaluate
from lmgym.kl import episode_kl
from lmgym.models.sampling import Sampler
from lmgym.optimum import solve
from lmgym.optimum.tree import Tree, make_episode_logits
from lmgym.rewards.noise import NoisyReward

ROOT = Path(__file__).parents[3]
PROBLEM = TinyProblem()


def coarse(prompts: list[str], completions: list[str], completion_ids: Any, **columns: Any) -> list[float]:
    """Scores 0, 0.5 and 1, with many ties."""
    return [sum(ids) % 3 / 2 for ids in completion_ids]


def tiny(num_envs: int = 1, **changes: Any) -> RLHFVectorEnv:
    task = replace(PROBLEM.task, **changes)
    return RLHFVectorEnv(num_envs, autoreset_mode="SameStep", task=task, split="train", device="cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(shifted(seed))


# -- half as good as the optimum ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "changes"),
    [(0.1, {}), (0.5, {}), (0.9, {}), (0.5, {"gamma": 0.7}), (0.5, {"gamma": 0.7, "dense_kl": False})],
)
def test_medium_has_its_share_of_the_gain_by_enumeration(share: float, changes: dict[str, Any]) -> None:
    """J of its policy at the task's own price, from the probability and the score of every response."""
    envs = tiny(**changes)
    tree = Tree.of(envs.task, "train")
    best = solve(envs.task, split="train")
    policy = Medium(envs, MediumConfig(share=share)).policy
    found = tree.evaluate(make_episode_logits(policy)).metrics["return"]
    assert (found - best.reference) / (best.value - best.reference) == pytest.approx(share, abs=2e-3)


def test_the_return_of_an_optimum_at_another_price_is_that_of_its_policy() -> None:
    """The derivative of V* by the price is the KL of the policy that is best at it: score and KL from enumeration."""
    task = PROBLEM.task
    tree = Tree.of(task, "train")
    for factor in (1.0, 2.0, 10.0):
        other = solve(task, split="train", kl_coef=factor * task.kl_coef)
        assert other.policy is not None
        by_slope = return_of_optimum(
            lambda k: solve(task, split="train", kl_coef=k).value, factor * task.kl_coef, task.kl_coef
        )
        by_hand = tree.evaluate(make_episode_logits(other.policy)).metrics["return"]
        assert by_slope == pytest.approx(by_hand, abs=1e-5)


def test_medium_needs_a_policy_that_a_solver_represents() -> None:
    envs: Any = gym.make_vec("lmgym/Reviews-v0", num_envs=1, device="cpu")
    with pytest.raises(InvalidArgumentError, match="`task` must be one whose optimal policy is known.*responses"):
        Medium(envs.unwrapped)


# -- policies that are given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Reference, Uniform, Optimal, Medium])
def test_predict_draws_from_the_distribution_of_the_policy(kind: Any) -> None:
    """Tokens after one prefix, drawn many times, against the distribution that enumeration has there."""
    envs = tiny(300)
    agent = kind(envs, seed=1)
    envs.reset(seed=0, options={"prompt_index": 1})
    observation, *_ = envs.step(np.full(300, 4))
    actions, state = agent.predict(observation)
    assert state is None
    walk = agent.policy.begin(torch.tensor([[4, 5]]), torch.ones(1, 2, dtype=torch.bool), PROBLEM.T)
    walk.step(torch.tensor([4]))
    distribution = walk.logits.softmax(-1)[0]
    share = np.bincount(actions, minlength=6) / 300
    assert np.abs(share - distribution.numpy()).max() < 4 * math.sqrt(0.25 / 300)
    likeliest, _ = agent.predict(observation, deterministic=True)
    assert (likeliest == distribution.argmax().item()).all()


def test_predict_is_of_the_samplers_distribution() -> None:
    envs = tiny(50)
    agent = Reference(envs, sampler=Sampler(greedy_tokens=1))
    observation, _ = envs.reset(seed=0)
    assert (agent.predict(observation)[0] == agent.predict(observation, deterministic=True)[0]).all()
    observation, *_ = envs.step(agent.predict(observation)[0])
    assert not (agent.predict(observation)[0] == agent.predict(observation, deterministic=True)[0]).all()


def test_the_reference_pays_no_kl_and_chance_pays_the_kl_of_the_uniform_distribution() -> None:
    envs = tiny()
    tree = Tree.of(PROBLEM.task, "train")
    assert evaluate(Reference(envs).policy, envs, samples=20, generator=seeded(0)).metrics["kl"].mean == pytest.approx(
        0, abs=1e-5
    )
    exact = tree.evaluate(make_episode_logits(Uniform(envs).policy)).metrics
    assert exact["kl"] > 0.1
    found = evaluate(Uniform(envs).policy, envs, samples=300, generator=seeded(0)).metrics
    for name in ("kl", "return", "score"):
        assert abs(found[name].mean - exact[name]) < 4 * (found[name].high - found[name].mean) / 1.96


def test_chance_gives_ids_that_the_tokenizer_lacks_no_probability(parts: dict[str, object]) -> None:
    envs = RLHFVectorEnv(1, **parts)
    envs.engine.lm.holes, holes = [3], envs.engine.lm.holes
    try:
        logits = Uniform(envs).policy.begin(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), 4).logits
    finally:
        envs.engine.lm.holes = holes
    distribution = logits.softmax(-1)
    assert (distribution[:, 3] == 0).all()
    legal = distribution[:, [i for i in range(distribution.shape[1]) if i != 3]]
    torch.testing.assert_close(legal, torch.full_like(legal, 1 / legal.shape[1]))


# -- the best of n: the exact distribution -----------------------------------------------------------------------------


def by_hand(probs: list[float], scores: list[float], n: int) -> list[float]:
    """The distribution of the first best of n, summed over all n-tuples of responses."""
    distribution = [0.0] * len(probs)
    for code in range(len(probs) ** n):
        drawn = [code // len(probs) ** i % len(probs) for i in range(n)]
        best = max(drawn, key=lambda y: scores[y])  # the first of equal ones
        distribution[best] += math.prod(probs[y] for y in drawn)
    return distribution


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("scores", [[0.0, 1.0, 1.0, -2.0], [0.5, 0.1, 0.2, 0.3], [1.0, 1.0, 1.0, 1.0]])
def test_the_distribution_of_the_best_is_that_of_all_tuples(scores: list[float], n: int) -> None:
    probs = [0.1, 0.2, 0.3, 0.4]
    found = best_of_n_log_probs(torch.tensor(probs).log(), torch.tensor(scores), n)
    assert found.exp().tolist() == pytest.approx(by_hand(probs, scores, n), abs=1e-6)


def exact(tree: Tree, n: int) -> dict[str, float]:
    """Score, KL and J of the best of n, by enumeration; means over prompts."""
    shape = (len(tree.prompts), -1)
    reference = tree.evaluate(make_episode_logits(PROBLEM.lm)).log_probs.view(shape)
    distribution = torch.stack([best_of_n_log_probs(*both, n) for both in zip(reference, tree.scores, strict=True)])
    score, kl = ((distribution.exp() * x).sum(1).mean().item() for x in (tree.scores, distribution - reference))
    return {"score": score, "kl": kl, "return": score - PROBLEM.kl_coef * kl}


@pytest.mark.parametrize("n", [1, 2, 4, 16, 256])
def test_no_kl_passes_the_bound_and_no_return_the_optimum(n: int) -> None:
    for task in (PROBLEM.task, replace(PROBLEM.task, reward=coarse)):
        tree = Tree.of(task, "train")
        found = exact(tree, n)
        assert -1e-9 < found["kl"] < kl_bound(n) + 1e-9
        assert found["return"] < tree.solve().value
        if n == 256 and task.reward is coarse:  # no more than -log P(the best score)
            assert found["kl"] < 0.4 * kl_bound(n)


def test_the_bound_is_reached_where_every_response_is_rare_and_scores_its_own() -> None:
    log_probs = torch.full((20_000,), -math.log(20_000.0), dtype=torch.float64)
    distribution = best_of_n_log_probs(log_probs, torch.arange(20_000.0), 8)
    assert ((distribution - log_probs) * distribution.exp()).sum().item() == pytest.approx(kl_bound(8), abs=1e-3)
    assert kl_bound(1) == 0


# -- the best of n: estimates ----------------------------------------------------------------------------------------


def averaged(draw: Any, n: int, answers: int, repeats: int) -> tuple[float, float]:
    """Mean over repeats of the estimated KL, and its standard error."""
    means = []
    for _ in range(repeats):
        scores = draw(answers * n)
        means.append(log_ratio_of_best(scores.view(-1, n).amax(1), scores, n).mean())
    return torch.stack(means).mean().item(), torch.stack(means).std().item() / math.sqrt(repeats)


@pytest.mark.parametrize("answers", [1, 2, 5])
def test_without_ties_the_estimate_is_unbiased_at_any_number_of_answers(answers: int) -> None:
    generator = seeded(answers)
    mean, error = averaged(lambda m: torch.rand(m, generator=generator), 4, answers, 3000)
    assert abs(mean - kl_bound(4)) < 4 * error + 1e-9
    assert error < 0.02


@pytest.mark.parametrize(("rare", "n"), [(0.02, 16), (0.5, 4)])
def test_with_ties_the_bias_vanishes_with_the_number_of_candidates(rare: float, n: int) -> None:
    distribution = torch.tensor([1 - rare, rare], dtype=torch.float64)
    best = best_of_n_log_probs(distribution.log(), torch.tensor([0.0, 1.0]), n)
    truth = (best.exp() * (best - distribution.log())).sum().item()
    generator = seeded(3)
    mean, error = averaged(lambda m: (torch.rand(m, generator=generator) < rare).float(), n, 400, 60)
    assert abs(mean - truth) < 4 * error + 0.005
    assert truth < 0.8 * kl_bound(n)  # so that taking the score for continuous would be seen


def test_where_all_score_alike_nothing_is_chosen() -> None:
    assert log_ratio_of_best(torch.ones(3), torch.ones(12), 4).tolist() == pytest.approx([0.0] * 3, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("reward", [None, coarse], ids=["no ties", "ties"])
def test_the_grade_is_that_of_enumeration(reward: Any) -> None:
    envs = tiny() if reward is None else tiny(reward=reward)
    agent = BestOfN(envs, BestOfNConfig(4))
    found = agent.evaluate(envs, samples=1000, generator=seeded(1)).metrics
    tree = Tree.of(envs.task, "train")
    truth = exact(tree, 4)
    wrong = exact(tree, 2)
    for name in ("score", "kl", "return"):
        assert found[name].mean == pytest.approx(truth[name], abs=0.04), name
        assert name == "return" or truth[name] - wrong[name] > 0.08  # another n would be seen
    assert found["kl_bound"].mean == kl_bound(4)


def test_a_grade_fits_together() -> None:
    envs = tiny(missing_eos_penalty=0.3)
    agent = BestOfN(envs, BestOfNConfig(3))
    graded = agent.evaluate(envs, samples=5, prompts=2, generator=seeded(1))
    episodes = graded.episodes
    metrics = graded.metrics
    assert episodes.prompt_index.tolist() == [0] * 5 + [1] * 5
    assert metrics["kl"].mean == pytest.approx(episode_kl(episodes).mean().item())
    price = PROBLEM.kl_coef * metrics["kl"].mean
    assert metrics["return"].mean == pytest.approx(episodes.scores.mean().item() - price, abs=1e-6)
    assert graded.bound is None
    assert agent.num_timesteps >= 3 * episodes.num_tokens / 2  # those of all candidates, not of the answers
    free = tiny(kl_coef=0.0)
    assert "kl" not in BestOfN(free, BestOfNConfig(2)).evaluate(free, samples=2).metrics


def test_the_best_of_n_by_a_noisy_score_is_graded_by_what_is_paid_on_average() -> None:
    envs = tiny(reward=NoisyReward(table_reward, 0.5))
    graded = BestOfN(envs, BestOfNConfig(4)).evaluate(envs, samples=50, generator=seeded(1))
    texts = [PROBLEM.prompts[i] for i in graded.episodes.prompt_index.tolist()]
    rows = zip(graded.episodes.response_ids.tolist(), graded.episodes.lengths.tolist(), strict=True)
    expected = table_reward(texts, [""] * len(texts), [row[:n] for row, n in rows])
    assert graded.metrics["score"].mean == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert graded.metrics["sampled_score"].mean > graded.metrics["score"].mean + 0.2  # the luck of the best
    price = PROBLEM.kl_coef * graded.metrics["kl"].mean
    assert graded.metrics["return"].mean == pytest.approx(graded.metrics["score"].mean - price, abs=1e-5)
    assert graded.no_bound is not None


def test_of_one_candidate_the_best_is_the_reference() -> None:
    envs = tiny()
    found = BestOfN(envs, BestOfNConfig(1)).evaluate(envs, samples=50, generator=seeded(4))
    plain = evaluate(Reference(envs).policy, envs, samples=50, generator=seeded(4))
    assert torch.equal(found.episodes.response_ids, plain.episodes.response_ids)
    assert abs(found.metrics["kl"].mean) < 1e-5


def test_the_chosen_one_is_the_first_best(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = tiny(reward=coarse)
    agent = BestOfN(envs, BestOfNConfig(5), seed=3)
    prompts = [envs.engine.prompts[i] for i in (0, 2)]
    chosen = agent.respond(envs, prompts)
    every = BestOfN(envs, BestOfNConfig(1), seed=3).respond(envs, [p for p in prompts for _ in range(5)])
    assert agent.num_timesteps == every.num_tokens
    for row in range(2):
        scores = every.scores[5 * row : 5 * row + 5].tolist()
        best = 5 * row + scores.index(max(scores))
        assert torch.equal(chosen.response_ids[row], every.response_ids[best])


def test_stepping_plays_the_answers_chosen() -> None:
    envs = tiny(4, reward=coarse)
    agent = BestOfN(envs, BestOfNConfig(8), seed=1)
    twin = BestOfN(envs, BestOfNConfig(8), seed=1)
    observation, _ = envs.reset(seed=0)
    answers = twin.respond(envs, [p for p in envs.engine.current if p is not None])
    played = []
    scores = {}
    for _ in range(PROBLEM.T):
        actions, _ = agent.predict(observation)
        played.append(actions)
        observation, _, terminated, _, infos = envs.step(actions)
        for row in np.flatnonzero(terminated):
            scores.setdefault(int(row), infos["final_info"]["score"][row])
    assert [scores[row] for row in range(4)] == pytest.approx(answers.scores.tolist())
    assert (played[0] == answers.response_ids[:, 0].numpy()).all()


def test_a_single_row_and_a_fixed_draw() -> None:
    env: Any = gym.make("lmgym/RLHF-v0", task=PROBLEM.task, split="train", device="cpu")
    agent = BestOfN(tiny(), BestOfNConfig(2))
    observation, _ = env.reset(seed=0)
    action, _ = agent.predict(observation, deterministic=True)
    assert np.ndim(action) == 0
    assert all(agent.predict(observation, deterministic=True)[0] == action for _ in range(5))
    assert len({int(agent.predict(observation)[0]) for _ in range(30)}) > 1
    observation["input_ids"][-PROBLEM.T] = (int(action) + 1) % 6
    observation["attention_mask"][-PROBLEM.T] = 1
    with pytest.raises(InvalidArgumentError, match="`observation` must be at the start"):
        BestOfN(tiny()).predict(observation)


def test_n_is_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="`n` must be"):
        BestOfNConfig(0)


# -- the command line ------------------------------------------------------------------------------------------------


def test_an_agent_grades_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plan = check(compose("train", overrides=["task=anchor", "evaluation.samples=2", "device=cpu"]))
    envs: Any = gym.make_vec("lmgym/RLHF-v0", **plan.settings)
    agent = Reference(envs)
    calls = []
    graded = agent.evaluate

    def spy(envs: Any, **given: Any) -> Any:
        calls.append((envs, given))
        return graded(envs, **given)

    monkeypatch.setattr(agent, "evaluate", spy)
    found = grade(plan, agent)
    ((held_out, given),) = calls
    assert len(held_out.engine.prompts) == 16
    assert (given["samples"], given["prompts"], given["sampler"]) == (2, None, plan.sampler)
    expected = evaluate(agent.policy, held_out, samples=2, generator=torch_generator(plan.seed, EVALUATION), exact=True)
    assert found.metrics == expected.metrics


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["uniform", "best_of_n"])
def test_the_command_line_grades_every_one_of_them(agent: str, tmp_path: Path) -> None:
    overrides = ["task=anchor", f"agent={agent}", "evaluation.samples=8", "device=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plan = check(compose("train", overrides=overrides))
    assert issubclass(plan.agent_class, FixedAgent)
    assert train(plan, tmp_path, resume=False) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    share = summary["after"]["normalised"]["mean"]
    if agent == "best_of_n":
        assert 0.2 < share < 1
        assert summary["total_timesteps"] > 16 * 8 * 16
    else:
        assert share < -0.5
