"""Gradings along the way: the learning curve of J on held-out prompts, which training does not notice."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from safetensors.torch import load_file

import agents.runs.along
from agents.runs.along import solved_at
from agents.runs.clock import Clock
from agents.runs.defaults import complete_agents
from agents.runs.grading import grade
from agents.runs.many import begin_many
from agents.runs.plan import Budget
from agents.runs.recorder import read_rows
from agents.runs.run import begin, go_on
from lmgym.errors import InvalidArgumentError

ROOT = Path(__file__).parents[3]
TINY = ["task=echo-2", "agent.width=16", "agent.layers=1", "device=cpu", "seed=4", "total_timesteps=80"]
TINY += ["evaluation.samples=2", "evaluation.prompts=2"]
SMALL_BATCH = {"rloo": ["agent.batch_size=8"], "sb3_a2c": ["agent.n_envs=4", "agent.n_steps=4"]}


complete_agents()


def config(agent: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=[f"agent={agent}", *TINY, *SMALL_BATCH[agent], *overrides])


def gradings(directory: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(directory / "metrics.jsonl") if "eval/return" in row]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted((directory / "checkpoint").glob("*.safetensors"))
    return {f"{path.name}/{name}": value for path in files for name, value in load_file(path).items()}


def summary_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("agent", ["rloo", "sb3_a2c"])
def test_training_does_not_notice_that_it_is_graded(
    agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_and_grade(*args: Any, **kwargs: Any) -> Any:  # as a reward does that draws from torch's own generator
        torch.rand(())
        return grade(*args, **kwargs)

    monkeypatch.setattr(agents.runs.along, "grade", draw_and_grade)
    plain = tmp_path / "plain"
    graded = tmp_path / "graded"
    assert begin(config(agent), plain) == begin(config(agent, "evaluation.every=20"), graded) == 0
    before = weights(plain)
    after = weights(graded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert summary_of(plain)["after"] == summary_of(graded)["after"]
    assert summary_of(plain)["forward_tokens"] == summary_of(graded)["forward_tokens"]
    batches = [row for row in read_rows(graded / "metrics.jsonl") if "eval/return" not in row]
    steps = [row["step"] for row in batches]
    due = [next(step for step in steps if step >= multiple) for multiple in (20, 40, 60)]
    assert [row["step"] for row in gradings(graded)] == [step for step in dict.fromkeys(due) if step < 80]
    assert [row["step"] for row in batches] == [row["step"] for row in read_rows(plain / "metrics.jsonl")]
    assert summary_of(plain)["solved_at"] is None
    assert list(summary_of(graded)["solved_at"]) == ["0.5", "0.8", "0.9", "0.95"]


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was graded along the way."""
    directory = tmp_path_factory.mktemp("runs") / "graded"
    assert begin(config("rloo", "evaluation.every=20", "agent.lr_schedule=constant"), directory) == 0
    return directory


def test_a_row_has_the_grading_with_its_interval_and_share(graded: Path) -> None:
    row = gradings(graded)[0]
    for name in ("return", "score", "kl", "length", "normalised"):
        low, mean, high = (row[f"eval/{name}{end}"] for end in ("/low", "", "/high"))
        assert low <= mean <= high
    assert row["time"] > 0
    scale = summary_of(graded)["optimum"]
    gain = scale["value"] - scale["reference"]["mean"]
    assert row["eval/normalised"] == pytest.approx((row["eval/return"] - scale["reference"]["mean"]) / gain)


def test_a_run_that_goes_on_has_each_grading_once(graded: Path, tmp_path: Path) -> None:
    settings = ["evaluation.every=20", "agent.lr_schedule=constant", "total_timesteps=41"]
    begin(config("rloo", *settings), tmp_path / "broken")
    assert len(gradings(tmp_path / "broken")) == 1
    assert go_on(tmp_path / "broken", ["total_timesteps=80"], []) == 0
    assert without_time(gradings(graded)) == without_time(gradings(tmp_path / "broken"))
    assert summary_of(graded)["after"] == summary_of(tmp_path / "broken")["after"]


def test_each_of_many_seeds_is_graded_as_alone(graded: Path, tmp_path: Path) -> None:
    settings = ["seed=3", "seeds=2", "evaluation.every=20", "agent.lr_schedule=constant"]
    begin_many(config("rloo", *settings), tmp_path / "all")
    alone = without_time(gradings(graded))
    together = without_time(gradings(tmp_path / "all" / "seed4"))
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_a_budget_of_tokens_ends_a_run_and_it_does_not_go_on(tmp_path: Path) -> None:
    assert begin(config("rloo", "budget.forward_tokens=200"), tmp_path / "run") == 0
    summary = summary_of(tmp_path / "run")
    assert summary["total_timesteps"] < 80
    assert 200 <= summary["forward_tokens"] < 400
    assert go_on(tmp_path / "run", [], []) == 0
    assert summary_of(tmp_path / "run")["total_timesteps"] == summary["total_timesteps"]
    with pytest.raises(InvalidArgumentError, match="`budget` must be null where `seeds` is above 1"):
        begin_many(config("rloo", "seeds=2", "budget.seconds=9"), tmp_path / "many")


def test_a_budget_is_spent_where_one_of_its_parts_is() -> None:
    assert not Budget().is_spent(10**9, 1e9)
    assert Budget(forward_tokens=5).is_spent(5, 0.0)
    assert Budget(seconds=5.0).is_spent(0, 5.0)
    assert not Budget(forward_tokens=5, seconds=5.0).is_spent(4, 4.9)


def test_the_clock_of_training_stands_still_in_a_grading() -> None:
    clock = Clock()
    with clock.stopped():
        time.sleep(0.05)
    assert clock.seconds() < 0.04


def test_a_task_is_solved_at_the_first_grading_that_reaches_a_share() -> None:
    rows = [
        {"step": 10, "time": 1.0, "eval/return": 1.4, "cost/forward_tokens": 100.0},
        {"step": 10, "rollout/return": 9.0},
        {"step": 20, "time": 2.0, "eval/return": 1.85, "cost/forward_tokens": 200.0},
        {"step": 30, "time": 3.0, "eval/return": 1.6, "cost/forward_tokens": 300.0},
    ]
    summary = {
        "optimum": {"value": 2.0, "reference": {"mean": 1.0}},
        "after": {"return": {"mean": 1.92}},
        "total_timesteps": 40,
        "train_seconds": 4.0,
        "forward_tokens": 400,
    }
    found = solved_at(rows, summary)
    assert found is not None
    assert found["0.5"] == found["0.8"] == {"step": 20, "seconds": 2.0, "forward_tokens": 200.0}
    assert found["0.9"] == {"step": 40, "seconds": 4.0, "forward_tokens": 400}
    assert found["0.95"] is None
    assert solved_at(rows[1:2], summary) is None
    assert solved_at(rows, {**summary, "optimum": {"value": None, "reference": {"mean": 1.0}}}) is None
