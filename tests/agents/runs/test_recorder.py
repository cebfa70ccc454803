from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.runs.recorder import METRICS_FILE, Recorder, read_rows
from lmgym.files import RunFileError


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines()]


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_row_is_a_json_line_and_a_tensorboard_scalar(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run", total=20, progress=False) as recorder:
        recorder.record(10, {"rollout/return": 0.5, "train/loss": torch.tensor(2.0)})
        assert lines(tmp_path / "run") == [{"step": 10, "rollout/return": 0.5, "train/loss": 2.0}], "not flushed"
        recorder.record(np.int64(20), {"rollout/return": np.float32(0.75)})
    assert lines(tmp_path / "run")[1] == {"step": 20, "rollout/return": 0.75}
    assert scalars(tmp_path / "run", "rollout/return") == [(10, 0.5), (20, 0.75)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null_in_json(tmp_path: Path, value: float) -> None:
    with Recorder(tmp_path, total=10, progress=False) as recorder:
        recorder.record(1, {"train/kl": value, "train/loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "train/kl": None, "train/loss": 1.0}]


def test_a_name_outside_the_vocabulary_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with (
        Recorder(tmp_path, total=10, progress=False) as recorder,
        pytest.raises(ValueError, match=r"one of rollout/, train/, cost/, time/, eval/; got \['loss'\]"),
    ):
        recorder.record(1, {"rollout/return": 1.0, "loss": 1.0})
    assert lines(tmp_path) == []


@pytest.mark.slow
def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path: Path) -> None:
    with Recorder(tmp_path, total=40, progress=False) as recorder:
        for step in (10, 20, 30):
            recorder.record(step, {"rollout/return": float(step)})
    time.sleep(1)  # TensorBoard reads files in the order of their names, which begin with the second they were made in
    with Recorder(tmp_path, total=40, resume_at=20, progress=False) as recorder:
        assert [row["step"] for row in lines(tmp_path)] == [10, 20]
        for step in (30, 40):
            recorder.record(step, {"rollout/return": -float(step)})
    expected = [(10, 10.0), (20, 20.0), (30, -30.0), (40, -40.0)]
    assert [(row["step"], row["rollout/return"]) for row in lines(tmp_path)] == expected
    assert scalars(tmp_path, "rollout/return") == expected
    assert not list(tmp_path.glob(".*")), "a temporary file was left over"


def test_resuming_survives_a_line_that_was_cut_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 10, "rollout/return": 1.0}\n{"step": 20, "rollo')
    with Recorder(tmp_path, total=40, resume_at=30, progress=False) as recorder:
        recorder.record(40, {"rollout/return": 2.0})
    assert [row["step"] for row in lines(tmp_path)] == [10, 40]


def test_resuming_before_anything_was_recorded(tmp_path: Path) -> None:
    with Recorder(tmp_path, total=40, resume_at=0, progress=False) as recorder:
        recorder.record(10, {"rollout/return": 1.0})
    assert [row["step"] for row in lines(tmp_path)] == [10]


def test_a_new_run_does_not_mix_with_an_earlier_one(tmp_path: Path) -> None:
    with Recorder(tmp_path, total=40, progress=False) as recorder:
        recorder.record(10, {"rollout/return": 1.0})
    with pytest.raises(FileExistsError, match="holds the metrics of an earlier run: pass `resume_at`"):
        Recorder(tmp_path, total=40, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0}, "`total` must be a positive number of env steps, got 0"),
        ({"total": 10, "resume_at": 11}, "`resume_at` must be an env step between 0 and 10, got 11"),
        ({"total": 10, "resume_at": -1}, "`resume_at` must be an env step between 0 and 10, got -1"),
    ],
)
def test_arguments_are_checked_before_anything_is_made(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recorder(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    for line in (
        "not json",
        "[1]",
        "{}",
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1, "train/loss": "1"}',
        "9" * 5000,
    ):
        path.write_text(f'{{"step": 10}}\n{line}\n{{"step": 20}}\n')
        with pytest.raises(RunFileError, match=r"Line 2 of .*metrics.jsonl` is not a row of metrics"):
            read_rows(path)
    path.write_bytes(b'{"step": 10}\n\xff\n')
    with pytest.raises(RunFileError, match=r"metrics.jsonl` must be UTF-8 text"):
        read_rows(path)
    assert read_rows_of(path, '{"step": 10}\n{"step": 2') == [{"step": 10}]


def read_rows_of(path: Path, text: str) -> list[dict]:
    path.write_text(text)
    return read_rows(path)


@pytest.mark.parametrize("name", [METRICS_FILE, "tensorboard"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside" / "new")
    with pytest.raises(RunFileError, match=f"{name}` must be no link, and is one"):
        Recorder(tmp_path / "run", total=10, progress=False)
    assert not list((tmp_path / "outside").iterdir())


def test_the_files_are_closed_when_training_is_interrupted(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, total=10, progress=False)
    with pytest.raises(KeyboardInterrupt), recorder:
        recorder.record(1, {"rollout/return": 1.0})
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="closed file"):
        recorder.record(2, {"rollout/return": 1.0})
    recorder.close()
    assert [row["step"] for row in lines(tmp_path)] == [1]


def test_the_bar_shows_return_score_kl_speed_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path, total=1000) as recorder:
        recorder.record(250, {"rollout/return": 0.5, "rollout/score": 1.25, "rollout/kl": 3.75})
        recorder.record(500, {"train/loss": 9.0})
    shown = capsys.readouterr().err
    assert "500/1.00k" in shown
    assert "tok/s" in shown
    assert "return=0.5, score=1.25, kl=3.75" in shown


@pytest.mark.parametrize("progress", [True, False])
def test_an_agent_that_learns_nothing_leaves_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    with Recorder(tmp_path, total=8, progress=progress):
        pass
    shown = capsys.readouterr().err
    assert shown.rpartition("\r")[2] == ""  # what a terminal still shows
    assert ("0%" in shown) == progress


def test_the_bar_of_a_resumed_run_starts_where_the_run_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder(tmp_path, total=1000, resume_at=400) as recorder:
        recorder.record(500, {"rollout/return": 0.5})
    shown = capsys.readouterr().err
    assert "400/1.00k" in shown
    assert "500/1.00k" in shown


def test_importing_the_recorder_loads_nothing_heavy() -> None:
    code = (
        "import sys, agents.runs.recorder, agents.runs.report;"
        "print({'torch', 'tensorboard', 'tqdm', 'matplotlib'} & sys.modules.keys())"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"
