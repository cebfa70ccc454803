"""What a policy earns without sampling: by tables, by writing down every response, and in an evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TinyProblem

from agents.algorithms.uniform import UniformPolicy
from lmgym.automata import from_regex, positions
from lmgym.evaluation import evaluate
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.models.tables import markov_lm
from lmgym.optimum import exact, solve
from lmgym.optimum.exact import exact_metrics
from lmgym.optimum.tree import Tree, count_responses, make_episode_logits
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, make_task

ROWS = np.array([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.5, 0.1, 0.4]])
OTHER = np.array([[0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.3, 0.3, 0.4]])


def table_task(**changes: Any) -> Task:
    numbers = {"kl_coef": 0.3, "max_new_tokens": 4, **changes}
    reward = AutomatonReward(from_regex("( a | b )* a b", {"a": 1, "b": 2}, vocab_size=3))
    prompts = {"test": ["a", "b"]}
    return Task(name="table", **{"model": markov_lm(ROWS, ["a", "b"]), "reward": reward, "prompts": prompts, **numbers})


def by_enumeration(policy: Any, task: Task) -> dict[str, float]:
    metrics = Tree.of(task, "test").evaluate(make_episode_logits(policy)).metrics
    return {name: metrics[name] for name in ("return", "score", "kl")}


def policies(task: Task) -> dict[str, Any]:
    lm = task.reference("cpu")
    other = markov_lm(OTHER, ["a", "b"])
    dearer = replace(task, kl_coef=1.0, optima={})
    return {
        "reference": CausalPolicy(lm),
        "another table": CausalPolicy(other),
        "uniform": UniformPolicy(lm),
        "optimal": solve(task).policy,
        "optimal elsewhere": solve(dearer).policy,
    }


@pytest.mark.parametrize(
    "changes", [{}, {"gamma": 0.7}, {"gamma": 0.7, "dense_kl": False}, {"missing_eos_penalty": 0.5}]
)
def test_tables_and_enumeration_agree(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = table_task(**changes)
    monkeypatch.setattr(exact, "MAX_RESPONSES", 1)  # so that it is the tables
    for name, policy in policies(task).items():
        assert exact_metrics(policy, task, "test") == pytest.approx(by_enumeration(policy, task), abs=1e-6), name


def test_an_automaton_of_each_prompt() -> None:
    task = table_task(reward=AutomatonReward(lambda ids: positions(ids, 3)))
    for name, policy in policies(task).items():
        assert exact_metrics(policy, task, "test") == pytest.approx(by_enumeration(policy, task), abs=1e-6), name


def test_the_optimum_of_another_automaton_is_not_mistaken_for_a_function_of_this_one() -> None:
    task = table_task()
    other = replace(task, reward=AutomatonReward(from_regex("b a .*", {"a": 1, "b": 2}, vocab_size=3)))
    policy = solve(other).policy
    assert exact_metrics(policy, task, "test") == pytest.approx(by_enumeration(policy, task), abs=1e-6)


@pytest.mark.slow
def test_any_policy_and_any_sampler_where_responses_are_few() -> None:
    problem = TinyProblem(horizon=2)
    task = replace(problem.task, prompts={"test": problem.prompts})
    for sampler in (
        Sampler(),
        Sampler(temperature=0.5),
        Sampler(top_k=2),
        Sampler(temperature=0),
        Sampler(greedy_tokens=1),
    ):
        found = exact_metrics(CausalPolicy(problem.other), task, "test", sampler)
        envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
        generator = torch.Generator().manual_seed(0)
        samples = evaluate(CausalPolicy(problem.other), envs, samples=400, sampler=sampler, generator=generator)
        assert set(found) == {"return", "score", "kl"}
        for name, value in found.items():
            interval = samples.metrics[name]
            arm = 2 * max(interval.high - interval.mean, interval.mean - interval.low)
            assert abs(interval.mean - value) < arm + 1e-4, (sampler, name)


def test_what_cannot_be_found_out_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_RESPONSES", 10)
    problem = TinyProblem(horizon=3)
    assert exact_metrics(CausalPolicy(problem.other), problem.task, "train") == {}
    assert exact_metrics(CausalPolicy(problem.lm), problem.task, "train") == {"kl": 0.0}  # the reference itself
    assert exact_metrics(CausalPolicy(problem.lm), problem.task, "train", Sampler(temperature=0.5)) == {}
    task = table_task()
    monkeypatch.setattr(exact, "MAX_ENTRIES", 10)
    assert exact_metrics(solve(task).policy, task, "test") == {}
    assert set(exact_metrics(CausalPolicy(task.reference("cpu")), task, "test")) == {"return", "score", "kl"}


@pytest.mark.parametrize("name", ["rare-4", "keyword-32", "discount-0.9", "noise-3"])
def test_the_suite_is_graded_exactly(name: str) -> None:
    task = make_task(name)
    stored = task.optima["test"]
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
    for policy, value in ((CausalPolicy(envs.engine.lm), stored.reference), (solve(task).policy, stored.value)):
        found = evaluate(policy, envs, samples=2, generator=torch.Generator().manual_seed(0), exact=True)
        assert found.metrics["return"].exact
        assert found.metrics["return"].mean == pytest.approx(value, abs=1e-6)
        assert not found.metrics["length"].exact
        assert len(found.episodes) == 2 * len(task.prompts["test"])


def test_only_the_prompts_that_are_graded_count() -> None:
    task = make_task("keyword-8")
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
    policy = solve(task).policy
    found = evaluate(policy, envs, samples=2, prompts=3, exact=True, generator=torch.Generator().manual_seed(0))
    assert found.metrics["return"].mean == pytest.approx(solve(task).values[:3].mean().item(), abs=1e-6)


def test_a_reference_that_is_loaded_is_not_loaded_again() -> None:
    """On a GPU, or too large to be held twice."""
    problem = TinyProblem(horizon=8)
    task = replace(problem.task, model=lambda: pytest.fail("the reference was loaded"))
    assert exact_metrics(CausalPolicy(problem.other), task, "train", reference=problem.lm) == {}
    assert exact_metrics(CausalPolicy(problem.lm), task, "train", reference=problem.lm) == {"kl": 0.0}


def test_the_number_of_responses_is_that_of_the_tree() -> None:
    for changes in ({}, {"max_new_tokens": 1}, {"min_new_tokens": 2}):
        task = table_task(**changes)
        assert count_responses(task, task.reference("cpu")) == len(Tree.of(task, "test").episodes) / 2
