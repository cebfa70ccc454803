"""What a worker leaves of a run that fails, however early: the error, and which run it was."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import agents.comparison.workers
from agents.comparison.directories import find_runs, is_finished
from agents.comparison.plan import make_cells, settings_of
from agents.comparison.protocol import Protocol
from agents.comparison.table import FAILED, read_runs
from agents.comparison.workers import INTERRUPTED, Job, Worker, _do
from agents.runs.defaults import complete_agents
from agents.runs.directory import new_run
from lmgym.errors import NotFiniteError

complete_agents()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    protocol = Protocol(("rloo",), ("echo-2",), (0,))
    (cell,) = make_cells(protocol, settings_of(protocol), (0,), tmp_path)
    return Job(cell.values, cell.directory)


@pytest.mark.parametrize("error", [NotFiniteError("it is nan"), ValueError("one\ntwo"), SystemExit(3), MemoryError()])
def test_a_run_that_fails_before_its_first_batch_is_a_failed_run_of_its_label(
    monkeypatch: pytest.MonkeyPatch, job: Job, error: BaseException
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(agents.comparison.workers, "_run", fail)
    answer = _do(job)
    assert answer.code == 1
    assert answer.error
    assert job.directory is not None
    (run,) = read_runs([job.directory]).runs
    assert (run.label, run.task, run.seed, run.state) == ("rloo", "echo-2", 0, FAILED)
    assert run.error == answer.error
    with new_run(job.directory, job.values):  # the same command begins it anew
        pass
    assert not is_finished(job.directory)


def test_results_without_their_config_do_not_get_another(job: Job) -> None:
    assert job.directory is not None
    job.directory.mkdir()
    graded = {"return": {"mean": 1.0}, "normalised": None}
    summary = {"before": graded, "after": graded, "train_seconds": 1.0, "total_timesteps": 100}
    (job.directory / "summary.json").write_text(json.dumps(summary))
    for _ in range(2):
        assert _do(job).code == 1
        assert not is_finished(job.directory)


def test_a_directory_that_cannot_be_made_fails_its_run_alone(job: Job) -> None:
    assert job.directory is not None
    job.directory.write_text("")
    answer = _do(job)
    assert answer.code == 1
    assert str(job.directory) in answer.error


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_process_that_ends_after_ctrl_c_has_been_interrupted_and_not_failed(job: Job, is_interrupted: bool) -> None:
    """The second Ctrl-C may reach it between its last batch and its answer."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    worker = Worker.__new__(Worker)
    worker.connection = ours
    worker._process = SimpleNamespace(pid=None, exitcode=0, join=lambda: None, is_alive=lambda: False)  # type: ignore[assignment]
    worker.job = job
    worker._is_interrupted = False
    if is_interrupted:
        worker.interrupt()
    answer = worker.answer()
    assert answer is not None
    assert (answer.code == INTERRUPTED) is is_interrupted
    assert job.directory is not None
    assert (job.directory / "error.txt").is_file() is not is_interrupted


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"before": 1, "after": 2, "train_seconds": 1, "total_timesteps": 2}']
)
def test_a_run_whose_summary_is_damaged_is_not_finished(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text("task: echo-2\n")
    (tmp_path / "summary.json").write_text(text)
    assert not is_finished(tmp_path)


def test_directories_that_go_in_rings_are_searched_once(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    run.mkdir(parents=True)
    (run / "error.txt").write_text("no config\n")
    for name in ("one", "two", "three"):
        (tmp_path / "a" / name).symlink_to(tmp_path, target_is_directory=True)
    assert find_runs([tmp_path]) == [run]
