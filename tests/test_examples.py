"""Every file in `examples/` runs with tiny numbers, is short, and says of the optimum what is true."""

from __future__ import annotations

import random
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from agents.runs.completions import Request
from agents.runs.datasets import write_datasets
from lmgym.optimum import solve
from lmgym.tasks import make_task, registry

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TINY = {
    "check_trainer": [],
    "custom_agent": ["--steps", "4000"],
    "custom_reward": ["--samples", "2", "--prompts", "4"],
    "custom_task": ["--samples", "500"],
    "discrete_sac": ["--steps", "320"],
    "dqn_mlp": ["--steps", "40", "--episodes", "2"],
    "feedback_loop": ["--rounds", "2", "--labels", "24", "--steps", "600"],
    "mcts": ["--simulations", "20", "--prompts", "1"],
    "offline_cql": ["lmgym/echo-2/medium-v0", "--steps", "500"],
    "ppo_single_file": ["--steps", "1024"],
    "sb3_ppo_mlp": ["--steps", "2048", "--samples", "16"],
}


def test_every_example_has_tiny_numbers() -> None:
    assert set(TINY) == {example.stem for example in EXAMPLES}


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line)]


def check_check_trainer(lines: list[str]) -> None:
    """One finding, that a time limit is taken as an end."""
    assert lines[0] == "single-file PPO: 14 ok, 1 FAILS, 19 not checked"
    assert lines[-1] == "to look at: truncation"


def check_custom_agent(lines: list[str]) -> None:
    """The table's value and every return end at V*."""
    (optimum,) = numbers(lines[0])
    value, returned = numbers(lines[-1])
    assert optimum == round(make_task("echo-2").optima["test"].value, 4)
    assert value == pytest.approx(optimum, abs=1e-3)
    assert returned == pytest.approx(optimum, abs=0.05)
    values = [numbers(line)[0] for line in lines[1:]]
    assert values == sorted(values, reverse=True)


def check_custom_reward(lines: list[str]) -> None:
    """The function by hand, and what is said of its optimum is no more than its largest value."""
    module = runpy.run_path(str(ROOT / "examples" / "custom_reward.py"))
    ids = [[0] * 8, [0] * 10]
    assert module["variety"](["x", "x"], ["a b b", "a"], completion_ids=ids) == pytest.approx([1 / 3, 1 - 0.04])
    score, low, high = numbers(lines[3])
    assert low <= score <= high
    assert numbers(lines[4])[0] <= 1  # no score is above


def check_custom_task(lines: list[str]) -> None:
    """J of the reference as it was played, and V* as every episode of pi* returned it."""
    (reference, optimum), (mean, low, high), best = (numbers(line) for line in lines)
    assert abs(mean - reference) < high - low < 0.1  # four standard errors
    assert best[0] == pytest.approx(optimum, abs=1e-3)  # every single episode of pi* earns V*
    assert best[1] <= optimum <= best[2] < best[1] + 0.02  # the few scores below 1 may hide rarer ones


def check_feedback_loop(lines: list[str]) -> None:
    """A row a round, whose labels add up, and whose gold return is the gold score less the price of the KL."""
    assert [int(line.split()[0]) for line in lines[1:]] == [24, 48]
    for line in lines[1:]:
        old, new, gold, kl, returned = numbers(line)
        assert 0 <= old <= 1
        assert 0 <= new <= 1
        assert returned == pytest.approx(gold - 0.2 * kl, abs=0.003)


def check_mcts(lines: list[str]) -> None:
    """A response that was found is no better than V* and, with these simulations, better than greedy decoding."""
    greedy, _, found, optimum = numbers(lines[0])
    assert greedy < found <= optimum == round(float(solve("keyword-8", kl_coef=0.02).values[0]), 4)


def check_offline_cql(lines: list[str]) -> None:
    """It is better than the reference, and no better than the optimum."""
    assert 0 < numbers(lines[-1])[1] <= 1


def check_ppo_single_file(lines: list[str]) -> None:
    """Before the first update it is the reference, up to the noise of 256 episodes."""
    assert abs(numbers(lines[0])[0]) < 0.1


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "check_trainer": check_check_trainer,
    "custom_agent": check_custom_agent,
    "custom_reward": check_custom_reward,
    "custom_task": check_custom_task,
    "feedback_loop": check_feedback_loop,
    "mcts": check_mcts,
    "offline_cql": check_offline_cql,
    "ppo_single_file": check_ppo_single_file,
}


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a program may do to its own process is undone: generators are seeded, tasks are registered."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_num_threads(threads)


def write_medium(out: Path) -> None:
    """The data set of `python -m agents.dataset task=echo-2 policies=medium samples=8 out=...`."""
    sampler = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy_tokens": 0}
    write_datasets(Request(["medium"], sampler, "echo-2", samples=8, device="cpu"), str(out))


@pytest.mark.slow
@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported already what each would import for seconds; from another directory."""
    monkeypatch.chdir(tmp_path)
    if example.stem == "offline_cql":
        pytest.importorskip("d3rlpy")  # it asks for an older Gymnasium than this project (docs/libraries.md)
        write_medium(tmp_path)
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(example), *TINY[example.stem]])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    if example.stem in CHECKS:
        CHECKS[example.stem](printed.splitlines())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 70
