"""Sweeps: finished runs are skipped, broken ones go on, a failed one stops no other, and all ends the same twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sources import ROOT

import agents.compare
import agents.comparison.sweep
from agents.comparison.live import FINISHED, RUNNING, WAITING, Live, Row, last_step, seconds_left
from agents.comparison.plan import Cell, Setting
from agents.comparison.sweep import Sweep
from agents.comparison.workers import INTERRUPTED, Answer, Job
from lmgym.errors import InvalidArgumentError


def make_cell(directory: Path, agent: str = "a", task: str = "t", seed: int = 0) -> Cell:
    values = {"total_timesteps": 100, "task": task, "agent": {"_target_": f"own.{agent}"}}
    return Cell(Setting(agent), task, seed, values, ("agent=a",), directory / f"{agent}-{task}-{seed}")


def finish(directory: Path, share: float | None = 0.5) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    graded = {"return": {"mean": 2.0}, "normalised": None if share is None else {"mean": share}}
    summary = {"before": graded, "after": graded, "train_seconds": 1.0, "total_timesteps": 100}
    (directory / "config.yaml").write_text("task: t\n")
    (directory / "summary.json").write_text(json.dumps(summary))


class Fake:
    """A worker in this process. What it does of a run stands in `fates`, by the name of its directory."""

    fates: dict[str, str] = {}
    given: list[str] = []
    made: list[Fake] = []

    def __init__(self) -> None:
        self.job: Job | None = None
        self.is_alive = True
        self.signals = 0
        Fake.made.append(self)

    def give(self, job: Job) -> None:
        assert self.is_alive
        self.job = job
        if job.directory is not None:
            Fake.given.append(job.directory.name)

    def answer(self) -> Answer | None:
        assert self.job is not None
        if self.job.directory is None:
            return Answer(1, "`agent.x` is wrong") if self.job.values.get("wrong") else Answer(0)
        fate = Fake.fates.get(self.job.directory.name, "finish")
        if fate == "ctrl-c":  # while it runs
            if not self.signals:
                os.kill(os.getpid(), signal.SIGINT)
                return None
            return Answer(INTERRUPTED)
        if fate == "die":
            self.is_alive = False
            return Answer(1, "the process died of signal 9")
        if fate == "fail":
            return Answer(1, "the last line")
        finish(self.job.directory)
        return Answer(0)

    def interrupt(self) -> None:
        self.signals += 1

    def end(self) -> None:
        self.is_alive = False


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    Fake.fates = {}
    Fake.given = []
    Fake.made = []
    monkeypatch.setattr(agents.comparison.sweep, "Worker", Fake)
    monkeypatch.setattr(agents.comparison.sweep, "wait_for", lambda workers, seconds: None)
    return Fake


def states(sweep: Sweep) -> list[str]:
    return [row.state for row in sweep.rows]


def test_finished_runs_are_skipped_and_the_others_run_in_order(fakes: type[Fake], tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, seed=seed) for seed in range(4)]
    finish(cells[1].directory)
    sweep = Sweep(cells, 2)
    sweep.run()
    assert fakes.given == ["a-t-0", "a-t-2", "a-t-3"]
    assert len(fakes.made) == 2
    assert states(sweep) == [FINISHED] * 4
    assert not sweep.is_stopped
    again = Sweep(cells, 2)
    again.run()
    assert len(fakes.made) == 2  # nobody is asked
    assert [row.result for row in again.rows] == ["0.500"] * 4


def test_a_run_that_fails_and_a_worker_that_dies_stop_no_other(
    fakes: type[Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [make_cell(tmp_path, seed=seed) for seed in range(4)]
    fakes.fates = {"a-t-0": "die", "a-t-2": "fail"}
    sweep = Sweep(cells, 1)
    sweep.run()
    assert len(fakes.made) == 2  # one took the place of the dead one
    assert [(row.state, row.error) for row in sweep.failed] == [
        ("failed", "the process died of signal 9"),
        ("failed", "the last line"),
    ]
    assert states(sweep).count(FINISHED) == 2
    assert "[1/4] own.a on t, seed 0: failed the process died of signal 9" in capsys.readouterr().out
    fakes.fates = {}
    again = Sweep(cells, 1)
    again.run()
    assert fakes.given[-2:] == ["a-t-0", "a-t-2"]


def test_ctrl_c_is_passed_on_and_no_further_run_begins(fakes: type[Fake], tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, seed=seed) for seed in range(3)]
    fakes.fates = {"a-t-1": "ctrl-c"}
    before = signal.getsignal(signal.SIGINT)
    sweep = Sweep(cells, 1)
    sweep.run()
    assert sweep.is_stopped
    assert states(sweep) == [FINISHED, "interrupted", WAITING]
    assert fakes.made[0].signals == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_config_that_cannot_be_starts_no_run(fakes: type[Fake], tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, "a"), make_cell(tmp_path, "b")]
    cells[1].values["wrong"] = True
    with pytest.raises(InvalidArgumentError, match="b on t: `agent.x` is wrong"):
        Sweep(cells, 2).run()
    assert not fakes.given


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_runs_alike(tmp_path: Path) -> None:
    fast = [Row(make_cell(tmp_path, "a", seed=seed), "a") for seed in range(3)]
    slow = [Row(make_cell(tmp_path, "b", seed=seed), "b") for seed in range(3)]
    assert seconds_left([*fast, *slow], 2) is None
    fast[0].state = slow[0].state = FINISHED
    fast[0].seconds = 10.0
    slow[0].seconds = 100.0
    slow[1].state = RUNNING
    slow[1].share = 0.5
    assert seconds_left([*fast, *slow], 1) == pytest.approx(10 + 10 + 50 + 100)
    assert seconds_left([*fast, *slow], 9) == 100.0  # the longest alone


def test_how_far_a_run_is_stands_in_its_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 3')
    assert last_step(path) == 20


def test_the_table_has_a_line_a_label_and_task_and_a_cell_a_seed(tmp_path: Path) -> None:
    import rich.console

    rows = [Row(make_cell(tmp_path, agent, seed=seed), agent) for agent in ("a", "b") for seed in (0, 1)]
    finish(rows[0].cell.directory)
    rows[0].finish()
    rows[1].state = RUNNING
    rows[1].share = 0.25
    rows[2].state = "failed"
    console = rich.console.Console(width=80, record=True)
    console.print(Live(rows, 2)._draw())
    text = console.export_text()
    assert "2 of 4 runs" in text
    (line,) = [line for line in text.splitlines() if " a " in line]
    assert "0.500" in line
    assert "25%" in line
    assert "failed" in text


# -- the command -----------------------------------------------------------------------------------------------------

TINY = ["agents=rloo,a2c", "tasks=echo-2", "seeds=1", "total_timesteps=400", "workers=1", "agent.batch_size=8"]
TINY += ["agent.width=8", "agent.layers=1", "evaluation.samples=2", "evaluation.prompts=2", "evaluation.every=100"]


@pytest.mark.slow
def test_a_comparison_that_was_killed_is_finished_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, f"out={tmp_path}"]
    command = [sys.executable, "-m", "agents.compare", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = tmp_path / "rloo-echo-2-0" / "summary.json"
    until = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    written = first.stat().st_mtime_ns
    assert agents.compare.main(arguments) == 0
    assert "share of the gain" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "report.html").is_file()
    for name in ("rloo", "a2c"):
        assert (tmp_path / f"{name}-echo-2-0" / "summary.json").is_file()
        origin = json.loads((tmp_path / f"{name}-echo-2-0" / "origin.json").read_text())
        assert origin["command"].startswith(f"python -m agents.train agent={name} task=echo-2 seed=0")
