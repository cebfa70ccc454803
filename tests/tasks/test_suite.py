"""The suite: what each task promises of itself, its optimum, and the policy that reaches it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import local_tasks, table_reward, word_count
from hydra import compose, initialize_config_dir

import agents.train  # noqa: F401  has Hydra read conf as the commands do
import lmgym
from agents.algorithms.best_of_n import BestOfN, BestOfNConfig
from agents.algorithms.optimal import Optimal
from agents.algorithms.rloo import RLOO, RLOOConfig
from agents.runs.plan import check
from agents.runs.run import train
from lmgym.errors import InvalidActionError, InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.evaluation import evaluate
from lmgym.kl import token_rewards
from lmgym.optimum import find_known, solve
from lmgym.rollout import collect
from lmgym.tasks import StoredOptimum, Task, make_task, registered_tasks, registry
from lmgym.tasks.arithmetic import arithmetic
from lmgym.tasks.keywords import SUCCESS
from lmgym.tasks.stored import ARTEFACTS
from lmgym.tasks.vocabulary import good
from lmgym.testing import check_task

ROOT = Path(__file__).parents[2]
NAMES = local_tasks()
EXACT = [task.name for task in lmgym.suite() if "test" in task.optima and task.optima["test"].exact]
FAMILIES = sorted(file.parent.name for file in Path(ARTEFACTS).glob("*/optima.json"))
BUILT_IN = [name for name in NAMES if name.partition("-")[0] in FAMILIES]  # another task may have no stored optimum
ONE_EACH = sorted({name.partition("-")[0]: name for name in reversed(EXACT)}.values())  # the first of each family


def rollouts(task: Task, samples: int, agent: Any = None) -> Any:
    """The optimal policy, graded on the test split."""
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, split="test", device="cpu")
    policy = (agent or Optimal(envs)).policy
    return evaluate(policy, envs, samples=samples, generator=torch.Generator().manual_seed(3))


# --- names ------------------------------------------------------------------------------------------------------


def test_every_family_with_a_stored_optimum_is_there() -> None:
    assert len(FAMILIES) >= 12
    assert set(FAMILIES) <= {name.partition("-")[0] for name in NAMES}


def test_names_and_versions_are_stable() -> None:
    """A task that changes gets a new version; one that is renamed or lost breaks papers."""
    ids = {task.env_id for task in registered_tasks().values()}
    assert {
        "lmgym/Keyword-8-v0",
        "lmgym/Anchor-0.1-v0",
        "lmgym/Echo-4-v0",
        "lmgym/Rare-5-v0",
        "lmgym/Reviews-v0",
    } <= ids
    assert all(env_id in gym.registry for env_id in ids)
    assert gym.registry["lmgym/Keyword-8-v0"].kwargs == {"task": "keyword-8"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_the_suite_is_light() -> None:
    """Every task and every stored optimum, in a fresh interpreter: no torch, few megabytes."""
    code = (
        "import sys, lmgym; tasks = lmgym.suite();"
        "status = dict(line.split(':') for line in open('/proc/self/status'));"
        "print(len(tasks), int(status['VmHWM'].split()[0]) / 1024, 'torch' in sys.modules,"
        f" all(task.optima for task in tasks if task.name in {BUILT_IN!r}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    count, megabytes, torch_loaded, known_optima = printed.split()
    assert int(count) == len(registered_tasks())
    assert float(megabytes) < 300
    assert (torch_loaded, known_optima) == ("False", "True")


# --- what the tasks say of themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [8, 16, 32, 64, 128])
def test_only_the_horizon_of_keyword_varies(horizon: int) -> None:
    task = make_task(f"keyword-{horizon}")
    assert task.max_new_tokens == horizon
    assert solve(task).reference == pytest.approx(SUCCESS, abs=1e-4)


@pytest.mark.parametrize("magnitude", [2, 3, 4, 5])
def test_rare_is_as_rare_as_it_says(magnitude: int) -> None:
    task = make_task(f"rare-{magnitude}")
    found = solve(task)
    assert found.reference == pytest.approx(10.0**-magnitude, rel=1e-3)
    closed = task.kl_coef * torch.log1p(found.references * np.expm1(1 / task.kl_coef))
    torch.testing.assert_close(found.values, closed)


def test_the_vocabulary_changes_nothing_but_the_number_of_actions() -> None:
    optima = [make_task(f"vocabulary-{size}").optima["test"] for size in (8, 64, 512, 4096, 50_000)]
    for first, second in itertools.pairwise(optima):
        assert first.value == pytest.approx(second.value, abs=1e-4)
        assert first.reference == pytest.approx(second.reference, abs=1e-4)
    assert good(512).sum() == 51


def test_stop_is_worth_most_at_the_best_length() -> None:
    reward: Any = make_task("stop-8").reward
    scores = reward(["a"] * 16, [""] * 16, completion_ids=[[1] * n for n in range(1, 17)])
    assert np.argmax(scores) == 7
    assert scores[7] == 1
    assert scores[15] == 0
    assert scores == pytest.approx([1 - abs(n - 8) / 8 for n in range(1, 17)])


def test_a_rare_eos_and_a_frequent_one_pull_the_length_their_way() -> None:
    means = []
    for name in ("stop-8-0.02", "stop-8", "stop-8-0.5"):
        task = make_task(name)
        assert solve(task).exact
        means.append(rollouts(task, 256).metrics["length"].mean)
    assert means == sorted(means, reverse=True)


def test_the_best_length_of_discount_falls_with_gamma() -> None:
    lengths = []
    for gamma in ("1", "0.99", "0.95", "0.9"):
        lengths.append(rollouts(make_task(f"discount-{gamma}"), 64).metrics["length"].mean)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]


@pytest.mark.slow
def test_the_kl_of_the_optimum_falls_with_its_price() -> None:
    kls = [rollouts(make_task(f"anchor-{price}"), 64).metrics["kl"].mean for price in ("0.01", "0.1", "1")]
    assert kls[0] > 4 * kls[1] > 16 * kls[2] > 0


def test_brackets_pay_for_balanced_words_of_the_depth_alone() -> None:
    reward: Any = make_task("brackets-2").reward
    words = {"([])": 1, "(())()": 1, "()": 0, "((()))": 0, "([)]": 0, "(()": 0, "": 0, "[[]]": 1}
    ids = [["?()[]".index(bracket) for bracket in word] + [0] for word in words]
    assert reward([":"] * len(ids), [""] * len(ids), completion_ids=ids) == list(words.values())
    assert reward([":"], [""], completion_ids=[[1, 3, 4, 2]]) == [0]  # balanced, and never said that it was done


def test_noise_is_on_the_score_and_not_on_the_optimum() -> None:
    noisy = make_task("noise-3")
    plain = make_task("anchor-0.1")
    assert noisy.optima["test"].value == plain.optima["test"].value
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=noisy, split="test", device="cpu")
    paid = collect(envs, Optimal(envs).policy, 1024, generator=torch.Generator().manual_seed(3))
    assert paid.gold_scores is not None
    errors = (paid.scores - paid.gold_scores).double()
    assert abs(errors.mean().item()) < 4 * 3 / len(errors) ** 0.5
    assert errors.std().item() == pytest.approx(3, rel=0.1)
    found = rollouts(noisy, 64)  # graded without it, so that every response of pi* returns V*
    torch.testing.assert_close(found.episodes.scores, found.episodes.gold_scores)
    assert found.metrics["return"].mean == pytest.approx(noisy.optima["test"].value, abs=1e-4)
    assert found.bound is not None
    assert found.bound.mean == pytest.approx(noisy.optima["test"].value, abs=1e-4)


# --- optima ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_the_stored_optimum_is_derived_again(name: str) -> None:
    task = make_task(name)
    for split, stored in task.optima.items():
        found = solve(task, split=split)
        assert found.method == stored.method
        assert found.value == pytest.approx(stored.value, abs=1e-4)
        assert found.reference == pytest.approx(stored.reference, abs=1e-4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_optimum_is_bounded_from_both_sides(name: str) -> None:
    """Within 2 % of the gain, and what an upper bound takes for granted is said."""
    optima = make_task(name).optima
    assert optima.keys() == {"train", "test"}
    for split, stored in optima.items():
        assert stored.upper is not None, split
        assert stored.lower <= stored.value <= stored.upper, split
        assert stored.width <= 0.02, split
        assert bool(stored.assumption) != stored.exact, split


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "share"),
    [("reviews", 16, 0.8), ("proxy-25", 16, 0.5)],
)
def test_no_best_of_n_passes_the_upper_bound(name: str, n: int, share: float) -> None:
    """On all prompts of the split that the bound is of. It comes near, for a bound far above would tell nothing."""
    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=name, split="test", device="cpu")
    stored = envs.task.optima["test"]
    found = BestOfN(envs, BestOfNConfig(n), seed=n).evaluate(envs, samples=1).metrics["return"]
    assert found.low < stored.upper
    assert found.mean > stored.reference + share * (stored.value - stored.reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["proxy-200"])
def test_no_trained_agent_passes_the_upper_bound(name: str) -> None:
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=16, task=name, group_size=4, device="cpu")
    agent = RLOO(envs, RLOOConfig(), seed=0)
    agent.learn(10_000)
    graded: Any = gym.make_vec("lmgym/RLHF-v0", task=name, split="test", device="cpu")
    found = evaluate(agent.policy, graded, samples=4, generator=torch.Generator().manual_seed(1)).metrics["return"]
    stored = envs.task.optima["test"]
    assert found.low < stored.upper
    assert found.mean > stored.reference + 0.3 * (stored.value - stored.reference)


def test_tree_and_automaton_agree_on_a_task_of_the_suite() -> None:
    from lmgym.optimum.tree import solve_tree

    for name in ("echo-4", "brackets-1", "stop-4"):
        task = replace(make_task(name), prompts={"test": make_task(name).prompts["test"][:3]}, optima={})
        task = replace(task, max_new_tokens=min(task.max_new_tokens, 5))
        torch.testing.assert_close(solve(task).values, solve_tree(task, "test").values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_optimal_agent_earns_the_optimum(name: str) -> None:
    task = make_task(name)
    found = rollouts(task, max(8, 512 // len(task.prompts["test"])))
    interval = found.metrics["return"]
    assert interval.low - 1e-4 < task.optima["test"].value < interval.high + 1e-4
    assert interval.high - interval.low < 0.2 * (task.optima["test"].value - task.optima["test"].reference)
    if task.gamma == 1:  # every single episode earns V*(x)
        returns = token_rewards(found.episodes, task.kl_coef, dense=task.dense_kl).sum(1)
        assert returns.view(len(task.prompts["test"]), -1).std(1).max() < 1e-4


def test_the_optimal_agent_acts_as_its_policy_does() -> None:
    envs: Any = gym.make_vec("lmgym/Echo-4-v0", num_envs=4, autoreset_mode="SameStep")
    agent = Optimal(envs, seed=1)
    observation, _ = envs.reset(seed=0)
    prompts = observation["input_ids"][:, :4].copy()
    actions = []
    for _ in range(4):
        action, _ = agent.predict(observation, deterministic=True)
        actions.append(action)
        observation, *_ = envs.step(action)
    assert (np.stack(actions, 1) == prompts).all()  # the likeliest thing the optimum does is to copy
    single, _ = agent.predict({key: value[0] for key, value in observation.items()})
    assert np.ndim(single) == 0


def test_the_optimal_agent_samples_on_from_where_it_was_saved(tmp_path: Path) -> None:
    envs: Any = gym.make_vec("lmgym/Anchor-0.1-v0", num_envs=8)
    first = Optimal(envs, seed=1)
    second = Optimal(envs, seed=2)
    observation, _ = envs.reset(seed=0)
    first.predict(observation)
    first.save(tmp_path / "optimal")
    second.load(tmp_path / "optimal")
    for _ in range(3):
        assert (first.predict(observation)[0] == second.predict(observation)[0]).all()


@pytest.mark.slow
def test_the_command_line_trains_the_optimal_agent_to_the_optimum(tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=["task=brackets", "agent=optimal", "total_timesteps=10", "device=cpu"])
    assert train(check(cfg), tmp_path, resume=False) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["optimum"]["lower"] == summary["optimum"]["upper"]
    assert summary["after"]["normalised"]["mean"] == pytest.approx(1, abs=1e-6)
    for when in ("before", "after"):  # a table and an automaton: nothing is left to chance
        for name in ("return", "score", "kl", "normalised"):
            interval = summary[when][name]
            assert interval["low"] == interval["high"], name


def test_where_no_solver_reaches_there_is_no_optimal_agent() -> None:
    envs: Any = gym.make_vec("lmgym/Reviews-v0")
    with pytest.raises(InvalidArgumentError, match="responses"):
        Optimal(envs)


def test_what_moves_the_optimum_drops_the_stored_one() -> None:
    stored = make_task("keyword-8")
    assert stored.optima["test"].exact
    for change in ({"kl_coef": 0.2}, {"gamma": 0.9}, {"max_new_tokens": 4}, {"reward": word_count}, {"prompts": ["c"]}):
        assert not make_task("keyword-8", **change).optima
    for change in ({"truncate": True}, {"kl_coef": 0.1}, {"gold": word_count}):
        assert make_task("keyword-8", **change).optima == stored.optima
    changed = make_task("keyword-8", kl_coef=0.2)
    assert find_known(changed, "test") == solve("keyword-8", kl_coef=0.2).stored()  # and is found again at once


def test_where_nothing_is_known_nothing_is_said() -> None:
    task = replace(make_task("keyword-8", reward=table_reward), max_new_tokens=5)
    assert find_known(task, "test") is None
    assert find_known(make_task("keyword-8", kl_coef=0), "test") is None
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        solve("keyword-8", kl_coef=0)
    with pytest.raises(InvalidArgumentError, match="responses"):
        solve(task, limit=1000)
    with pytest.raises(UnknownNameError, match="Did you mean 'keyword-8'"):
        solve("keyword8")


# --- tasks of one's own --------------------------------------------------------------------------------------------


@pytest.fixture
def _clean_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))


@pytest.mark.parametrize("name", sorted({name.partition("-")[0]: name for name in reversed(NAMES)}.values()))
def test_a_task_of_each_family_passes_the_conformance_kit(name: str) -> None:
    check_task(name)


@pytest.mark.usefixtures("_clean_registries")
def test_a_third_partys_task_gets_an_id_and_the_same_tests() -> None:
    mine = replace(make_task("keyword-8"), name="mine-2", kl_coef=0.3, optima={})
    env_id = lmgym.register_task("mine-2", lambda: mine, version=1)
    assert env_id == "lmgym/Mine-2-v1"
    assert gym.make(env_id).unwrapped.task.kl_coef == 0.3
    assert "mine-2" in [task.name for task in lmgym.suite()]
    check_task("mine-2")
    for name in ("Mine", "mine 2", "", 3):
        with pytest.raises(InvalidArgumentError, match="`name` must be like"):
            lmgym.register_task(name, lambda: mine)  # type: ignore[arg-type]


def test_the_kit_finds_what_is_wrong() -> None:
    task = make_task("keyword-8")
    wrong: list[tuple[Task, str]] = [
        (replace(task, prompts={"train": ["c"]}), "must have the splits"),
        (replace(task, prompts={"train": ["c", "d"], "test": ["d"]}), "equal or disjoint"),
        (replace(task, optima={"test": StoredOptimum("x", 0.5, 0.6, 0.7, 0.02)}), "within its bounds"),
        (replace(task, optima={"test": StoredOptimum("x", 0.01, 0.01, 0.01, 0.02)}), "not lie below"),
        (replace(task, optima={"test": StoredOptimum("x", 0.6, 0.6, 0.6, 0.2)}), "is stored as 0.2"),
        (replace(task, reward=lambda prompts, completions, **columns: [float("nan")] * len(prompts)), "finite"),
    ]
    for broken, message in wrong:
        with pytest.raises(LmGymError, match=message):
            check_task(broken)


def test_arithmetic_knows_no_other_token() -> None:
    env = gym.make("lmgym/RLHF-v0", task=arithmetic(1))
    env.reset(seed=0)
    with pytest.raises(InvalidActionError):
        env.step(env.action_space.n)
