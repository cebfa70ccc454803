"""Where the gap of a run comes from: what is measured of its critic, its class and its estimator, and what is kept."""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from conftest import shifted
from torch import Tensor

import agents.runs.anatomy
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.rloo import RLOO, RLOOConfig
from agents.runs import anatomy_learning
from agents.runs.anatomy import ANATOMY_FILE, dissect_run, read_or_measure
from agents.runs.anatomy_learning import Known, measure_class, measure_critic, measure_estimator
from agents.runs.anatomy_picture import PICTURE
from agents.runs.anatomy_report import anatomy_table, examples_table
from agents.runs.directory import write_config
from agents.runs.plan import build, check
from benchmarks import gradients
from lmgym.models.sampling import Sampler
from lmgym.optimum.anatomy import soft_values, visits
from lmgym.optimum.tree import Tree

EVALUATION = {"split": "test", "samples": None, "prompts": None}


# -- the class of the policy -----------------------------------------------------------------------------------------


class Table:
    """A policy with some weights alone; nothing reads it but through the logits that it is given with."""

    def __init__(self, *weights: Tensor) -> None:
        self._weights = list(weights)

    def policy_parameters(self) -> list[Tensor]:
        return self._weights


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.of(gradients.make_task())


@pytest.fixture(scope="module")
def start(tree: Tree) -> Tensor:
    return gradients.at_distance(tree, gradients.directions(tree, 1, seed=0)[0], 1.0)


def known_of(tree: Tree, logits: Any, *weights: Tensor) -> Known:
    with torch.no_grad():
        log_probs = tree.responses.read(logits)
    return Known(tree, Table(*weights), Sampler(), logits, log_probs)  # type: ignore[arg-type]


def test_a_table_of_all_prefixes_can_go_all_the_way_up(tree: Tree, start: Tensor) -> None:
    """One row of logits for every prefix, found by its tokens."""
    with torch.no_grad():
        own = tree.responses.read(partial(gradients.table_logits, start))
    prefixes = [tuple(tree.responses.prefix(t, n)) for t, level in enumerate(own) for n in range(level.shape[1])]
    rows = {prefix: i for i, prefix in enumerate(prefixes)}
    table = torch.cat([level[0] for level in own]).clone().requires_grad_()

    def logits(episodes: Any) -> Tensor:
        lengths = episodes.lengths.tolist()
        chosen = zip(episodes.response_ids.tolist(), lengths, strict=True)
        return table[[rows[tuple(row[:t])] for row, n in chosen for t in range(n)]]

    found = measure_class(known_of(tree, logits, table), iterations=100)
    assert found["share"] == pytest.approx(1, abs=1e-4)
    advantages = soft_values(tree, own).advantages
    reach = visits(tree.responses, own)
    squared = sum(
        (w * (p.exp() * a.square()).sum(-1)).sum().item() for w, p, a in zip(reach, own, advantages, strict=True)
    )
    assert found["squared_advantage"] == pytest.approx(squared)
    table = torch.cat([level[0] for level in tree.solve_levels().log_probs]).clone().requires_grad_()
    assert measure_class(known_of(tree, logits, table))["share"] is None  # nothing is left


def test_what_a_class_can_follow_is_the_r2_of_a_regression(tree: Tree, start: Tensor) -> None:
    """A table by position and last token cannot tell what came before that: least squares over all responses."""
    table = start.clone().requires_grad_()
    found = measure_class(known_of(tree, partial(gradients.table_logits, table), table), iterations=100)
    f = gradients.facts(tree, start)
    returns = (f.scores.unsqueeze(1) - f.kl_coef * gradients.to_go(f.log_ratio)) * f.mask
    value = f.value(returns)
    after = torch.nn.functional.pad(value[:, 1:], (0, 1)) * f.mask
    last = torch.nn.functional.pad(f.mask[:, 1:], (0, 1)) == 0
    advantages = torch.where(last, f.scores.unsqueeze(1), after) - f.kl_coef * f.log_ratio - value
    weights = (f.probs.unsqueeze(1) * f.mask)[f.mask].sqrt().unsqueeze(1)
    features = weights * f.score_function[f.mask]
    target = weights * advantages[f.mask].unsqueeze(1)
    fitted = features @ torch.linalg.lstsq(features, target, driver="gelsd").solution
    share = (fitted.square().sum() / target.square().sum()).item()
    assert share < 0.995
    assert found["share"] == pytest.approx(share, abs=1e-3)


# -- the critic and the estimator ------------------------------------------------------------------------------------


def small_envs(**changes: Any) -> Any:
    settings = {"task": "vocabulary-8", "split": "test", "device": "cpu", "max_new_tokens": 2, **changes}
    return gym.make_vec("lmgym/RLHF-v0", autoreset_mode="SameStep", **settings)


def move(agent: Any, size: float) -> None:
    """Weights that are no longer those of the reference."""
    agent.num_timesteps = 1
    generator = torch.Generator().manual_seed(shifted())
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def test_a_critic_that_says_0_is_off_by_v(tree: Tree) -> None:
    agent = PPO(small_envs(num_envs=16), PPOConfig(batch_size=16))
    tree = Tree.of(agent.envs.task)
    known = Known.of(tree, agent.policy, Sampler())
    values = soft_values(tree, known.log_probs).values
    reach = visits(tree.responses, known.log_probs)
    found = measure_critic(known)
    square = sum((w * v.square()).sum() for w, v in zip(reach, values, strict=True)) / sum(w.sum() for w in reach)
    assert found["rmse"] == pytest.approx(square.sqrt().item())
    assert found["explained_variance"] == pytest.approx(0, abs=1e-6)
    move(agent, 0.1)
    assert measure_critic(Known.of(tree, agent.policy, Sampler()))["rmse"] != pytest.approx(found["rmse"], rel=1e-3)


def test_the_update_of_rloo_is_unbiased() -> None:
    envs = small_envs(num_envs=32, group_size=8)
    agent = RLOO(envs, RLOOConfig(batch_size=32, group_size=8))
    move(agent, 0.1)
    known = Known.of(Tree.of(envs.task), agent.policy, Sampler())
    found = measure_estimator(agent, small_envs(num_envs=32, group_size=8), known, seed=1, episodes=3000)
    assert found["policy"] is None  # it has no critic
    assert found["exact_values"] is None
    assert found["batches"] == 3000 // 32
    update = found["update"]
    assert abs(update["cosine"] - 1) < 4 * update["cosine_error"] + 0.01
    assert update["norm"] == pytest.approx(1, abs=0.15)
    assert update["variance"] > 0


def test_a_critic_that_is_wrong_turns_the_update_of_ppo_away() -> None:
    envs = small_envs(num_envs=64)
    agent = PPO(envs, PPOConfig(batch_size=64, gae_lambda=0.0, whiten_advantages="none", vf_coef=5.0))
    move(agent, 0.1)
    with torch.no_grad():
        agent.policy.value_head.weight *= 20
    known = Known.of(Tree.of(envs.task), agent.policy, Sampler())
    found = measure_estimator(agent, small_envs(num_envs=64), known, seed=1, episodes=2000)
    update, policy, exact = (found[name]["cosine"] for name in ("update", "policy", "exact_values"))
    assert exact > 0.9
    assert max(update, policy) < exact - 0.1
    assert update != pytest.approx(policy, abs=0.01)  # the critic's own loss pulls at the same weights


# -- a run -----------------------------------------------------------------------------------------------------------


def saved_run(directory: Path, *, task: str = "vocabulary-8", agent: str = "ppo.PPO", **env: Any) -> Path:
    values = {
        "task": task,
        "seed": 1,
        "seeds": 1,
        "total_timesteps": 100,
        "checkpoint_every": 100,
        "device": "cpu",
        "env": {"split": "train", **env},
        "agent": {"_target_": f"agents.algorithms.{agent}"} | ({"batch_size": 64} if agent == "ppo.PPO" else {}),
        "sampler": {},
        "evaluation": dict(EVALUATION),
    }
    directory.mkdir()
    write_config(directory, values)
    build(check(values)).save(directory / "checkpoint")
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("runs") / "run", max_new_tokens=2)


def test_a_run_is_taken_apart_and_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy_learning, "MAX_BATCHES", 4)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        gap = dissect_run(run, {}, ())
    found = json.loads((run / ANATOMY_FILE).read_text())
    assert found["gap"]["gap"]["mean"] == gap > 0
    assert (run / PICTURE).read_bytes()[:4] == b"\x89PNG"
    assert (found["agent"], found["task"], found["seed"], found["step"]) == ("PPO", "vocabulary-8", 1, 0)
    assert found["gap"]["method"] == "tree"
    assert sum(part["mean"] for part in found["gap"]["by_step"]) == pytest.approx(gap, abs=1e-6)
    assert found["unknown"] == {}
    assert len(found["gap"]["states"]) == 20
    for example in found["examples"]:
        assert "".join(token["token"] for token in example["tokens"])
        assert all(token["share"] >= 0 for token in example["tokens"])
    text = stdout.getvalue()
    for words in ("V* - J", "at the start", "pass@1", "under-explored", "critic", "policy class", "estimator"):
        assert words in text


def test_what_was_measured_is_read_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = read_or_measure(run)
    assert measured is not None
    monkeypatch.setattr(agents.runs.anatomy, "measure", None)
    assert read_or_measure(run) == json.loads(json.dumps(measured))
    assert read_or_measure(run, learning=False) == measured
    path = run / ANATOMY_FILE
    path.write_text(json.dumps({**measured, "learning": False}))
    assert read_or_measure(run, learning=False) is not None
    with pytest.raises(TypeError):  # there is more to measure
        read_or_measure(run)
    stale = {**measured, "checkpoint": 0}
    path.write_text(json.dumps(stale))
    with pytest.raises(TypeError):  # it would be measured anew
        read_or_measure(run)


def test_a_table_from_samples_shows_intervals_and_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved_run(tmp_path / "run", task="keyword-8")
    monkeypatch.setattr(agents.runs.anatomy, "EVALUATION_EPISODES", 256)
    found = read_or_measure(run)
    assert found is not None
    assert found["gap"]["method"] == "samples"
    text = anatomy_table(found)
    assert " to " in text.splitlines()[0]
    assert "not known: The task has more than 40,000 responses" in text
    assert ", step " in text
    assert ", q" in text
    marked = examples_table(found["examples"], colours=True)
    assert "\033[30;48;2;255;" in marked
    assert "[0." in examples_table(found["examples"], colours=False)


def test_runs_that_cannot_be_taken_apart_have_no_anatomy(tmp_path: Path) -> None:
    best = saved_run(tmp_path / "best", agent="best_of_n.BestOfN")
    assert read_or_measure(best) is None
    late = saved_run(tmp_path / "late", max_new_tokens=2, gamma=0.9, dense_kl=False)
    assert read_or_measure(late) is None
    assert not (late / ANATOMY_FILE).exists()
    gap = read_or_measure(saved_run(tmp_path / "gap", max_new_tokens=2), learning=False)
    assert gap is not None
    assert gap["critic"] is None
    assert set(gap["unknown"].values()) == {"It was not asked for."}
    free = saved_run(tmp_path / "free", max_new_tokens=2, kl_coef=0.0)
    assert read_or_measure(free) is None
