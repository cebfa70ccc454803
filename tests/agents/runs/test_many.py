"""`python -m agents.train seeds=3`: every seed has the directory of a single run, and all of them go on together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

import agents.runs.many
import agents.train
from agents.agent import Agent
from agents.many_seeds import ManySeeds
from agents.runs.directory import RUN_FILES, read_values
from agents.runs.many import begin_many, go_on_with_many, mean_return, seed_directories
from agents.runs.recorder import read_rows
from agents.runs.regrade import regrade
from agents.runs.run import begin
from agents.runs.signals import Interrupt
from agents.runs.trackers import TRACKER_FILE, WANDB
from lmgym.errors import InvalidArgumentError, NotFiniteError

ROOT = Path(__file__).parents[3]
TINY = [
    "task=echo-2",
    "agent=rloo",
    "agent.batch_size=8",
    "agent.width=16",
    "agent.layers=1",
    "total_timesteps=60",
    "evaluation.samples=2",
    "evaluation.prompts=2",
    "device=cpu",
    "seed=4",
]


def config(*overrides: str) -> Any:
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=[*TINY, *overrides])


def curve(directory: Path) -> list[tuple[int, float]]:
    """Steps and returns of a run."""
    return [(row["step"], row["rollout/return"]) for row in read_rows(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "all"
    assert begin_many(config("seeds=2"), directory) == 0
    return directory


def test_every_seed_has_what_a_run_alone_leaves(finished: Path, tmp_path: Path) -> None:
    assert [path.name for path in seed_directories(finished)] == ["seed4", "seed5"]
    assert sorted(path.name for path in finished.iterdir()) == ["seed4", "seed5"]
    alone = tmp_path / "alone"
    assert begin(config("seed=5"), alone) == 0
    both = (alone, finished / "seed5")
    left = set(RUN_FILES) - {WANDB, TRACKER_FILE}  # which other trackers leave
    assert {path.name for path in alone.iterdir()} == {path.name for path in both[1].iterdir()} == left
    assert read_values(both[1]) == read_values(alone)
    summaries = [json.loads((path / "summary.json").read_text()) for path in both]
    assert summaries[0].keys() == summaries[1].keys()
    assert summaries[0]["after"]["return"]["mean"] == pytest.approx(summaries[1]["after"]["return"]["mean"], abs=1e-3)
    assert [step for step, _ in curve(alone)] == [step for step, _ in curve(both[1])]
    assert dict(curve(alone)) == pytest.approx(dict(curve(both[1])), abs=1e-4)


def test_a_seed_is_graded_and_resumed_as_a_run(finished: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    shutil.copytree(finished / "seed4", one)
    graded = regrade(one, OmegaConf.create({"split": None, "samples": None, "prompts": None}), [])
    assert graded == pytest.approx(json.loads((one / "summary.json").read_text())["after"]["return"]["mean"], abs=1e-5)
    agents.train.main(OmegaConf.create({"resume": str(one)}))


def test_the_command_returns_the_mean_and_prints_a_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agents.train.main(OmegaConf.create({"resume": str(finished)})) == pytest.approx(mean_return(finished))
    shown = capsys.readouterr().out
    assert "2 of 2 runs in" in shown
    assert [line.split()[0] for line in shown.splitlines() if "±" in line and "runs in" not in line] == ["4", "5", "2"]


def test_a_stop_saves_every_seed_and_the_printed_command_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    asked = Interrupt.__enter__

    def stop_at_once(self: Interrupt) -> Interrupt:
        self.asked = True
        return asked(self)

    with monkeypatch.context() as stopping:
        stopping.setattr(Interrupt, "__enter__", stop_at_once)
        assert begin_many(config("seeds=2"), broken) == 130
    assert f"resume={broken}" in capsys.readouterr().out
    assert [len(curve(path)) for path in seed_directories(broken)] == [1, 1]
    assert go_on_with_many(broken, [], []) == 0
    for own, other in zip(seed_directories(broken), seed_directories(finished), strict=True):
        steps = [step for step, _ in curve(own)]
        assert steps == [step for step, _ in curve(other)]
        assert dict(curve(own)) == pytest.approx(dict(curve(other)), abs=1e-4)


def test_what_cannot_be_leaves_no_directory(finished: Path, tmp_path: Path) -> None:
    for overrides, expected in (
        (["agent.policy=gru"], r"`agent\.policy` must be .* where `seeds` is above 1"),
        (["agent=trpo"], "`agent` must be one without a `update` of its own"),
        (["seeds=0"], "`seeds` must be"),
    ):
        with pytest.raises(InvalidArgumentError, match=expected):
            begin_many(config("seeds=2", *overrides), tmp_path / "none")
        assert not (tmp_path / "none").exists()
    with pytest.raises(InvalidArgumentError, match=r"`hydra\.run\.dir` must be a directory without a run"):
        begin_many(config("seeds=2"), finished)
    with pytest.raises(InvalidArgumentError, match="`seeds` must be as it was"):
        go_on_with_many(finished, ["seeds=3"], [])


def test_a_seed_that_diverges_is_named_and_the_others_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def learn(self: ManySeeds, total: int, callbacks: Any) -> None:
        self.failures[self.agents[0]] = NotFiniteError("Training has diverged: `x`.")

    monkeypatch.setattr(ManySeeds, "learn", learn)
    assert begin_many(config("seeds=2"), tmp_path / "all") == 1
    assert "seed 4: Training has diverged: `x`." in capsys.readouterr().err
    assert [(path / "summary.json").is_file() for path in seed_directories(tmp_path / "all")] == [False, True]


def test_where_training_fails_every_seed_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = ManySeeds.learn

    def fail(self: ManySeeds, total: int, callbacks: Any) -> None:
        learn(self, 20, callbacks)
        raise RuntimeError("the reward is gone")

    monkeypatch.setattr(ManySeeds, "learn", fail)
    with pytest.raises(RuntimeError, match="the reward is gone"):
        begin_many(config("seeds=2"), tmp_path / "all")
    assert f"goes on with: {agents.runs.many.shell_command('agents.train')}" in capsys.readouterr().err
    assert all((path / "checkpoint").is_dir() for path in seed_directories(tmp_path / "all"))


def test_every_seed_has_an_agent_of_the_contract(finished: Path) -> None:
    plan = agents.runs.many.check_saved(finished / "seed4", read_values(finished / "seed4"))
    assert issubclass(plan.agent_class, Agent)
    assert plan.seed == 4
