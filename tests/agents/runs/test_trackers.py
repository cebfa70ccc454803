"""Where metrics go besides `metrics.jsonl`: each tracker with its package, offline, and what happens if one fails."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest

import agents.train  # noqa: F401  has Hydra read conf as the commands do
from agents.runs import trackers
from agents.runs.config import CONF
from agents.runs.directory import write_config
from agents.runs.many import begin_many
from agents.runs.plan import plain
from agents.runs.recorder import Recorder, read_rows
from agents.runs.run import begin, go_on, with_overrides
from agents.runs.trackers import TRACKER_FILE, TrackerConfig, check_tracker, find_tracker
from lmgym.errors import InvalidArgumentError
from lmgym.files import RunFileError, read_json

ROWS = {4: {"rollout/return": 0.5, "train/loss": float("nan")}, 8: {"rollout/return": 0.75}}
SMALL = ("task=echo-2", "agent.batch_size=8", "agent.minibatches=1", "agent.epochs=1", "agent.policy=mlp")


def composed(*overrides: str) -> Any:
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return hydra.compose("train", overrides=["device=cpu", *SMALL, "total_timesteps=30", *overrides])


def record(directory: Path, config: TrackerConfig, resume_at: int | None = None, first: int = 0) -> None:
    with Recorder(directory, total=20, resume_at=resume_at, progress=False, tracker=config) as recorder:
        for step, values in ROWS.items():
            if step > first:
                recorder.record(step, values)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run directory with a config, and a database of MLflow beside it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = tmp_path / "run"
    directory.mkdir()
    write_config(directory, {"task": "echo-2", "agent": {"lr": 0.001}, "seed": 3})
    return directory


# -- each with its package -------------------------------------------------------------------------------------------


def mlflow_run(directory: Path) -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{directory.parent / 'mlflow.db'}")
    return client, client.get_run(read_json(directory / TRACKER_FILE)["mlflow"])


@pytest.mark.slow
def test_mlflow_has_the_metrics_and_the_config(offline: Path) -> None:
    pytest.importorskip("mlflow", reason="needs mlflow: pip install mlflow")
    config = TrackerConfig("mlflow", project="mine")
    record(offline, config)
    first = read_json(offline / TRACKER_FILE)["mlflow"]
    record(offline, config, resume_at=4, first=4)
    client, run = mlflow_run(offline)
    assert run.info.run_id == first
    assert run.info.status == "FINISHED"
    assert run.data.params["agent.lr"] == "0.001"
    history = client.get_metric_history(first, "rollout/return")
    assert sorted({(metric.step, metric.value) for metric in history}) == [(4, 0.5), (8, 0.75)]
    assert "train/loss" not in run.data.metrics
    assert client.get_experiment(run.info.experiment_id).name == "mine"


@pytest.mark.slow
def test_wandb_has_the_metrics_and_the_config(offline: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    config = TrackerConfig("wandb", project="mine", mode="offline")
    record(offline, config)
    first = read_json(offline / TRACKER_FILE)["wandb"]
    time.sleep(1.1)  # the directory of an offline run is named by its second
    record(offline, config, resume_at=4, first=4)
    assert read_json(offline / TRACKER_FILE)["wandb"] == first
    kept = sorted(offline.glob(f"wandb/offline-run-*/run-{first}.wandb"))
    assert kept
    history = [step for path in kept for step in wandb_steps(path)]
    assert history == [4, 8, 8]


def wandb_steps(path: Path) -> list[int]:
    """The env steps of the rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(json.loads(items["step"]))
    return steps


def leveldb_records(content: bytes, header: int = 7, block: int = 2**15) -> Iterator[bytes]:
    """The records of a log of LevelDB, as an offline run is one: each part has a checksum, a length and a kind."""
    position = header
    parts = b""
    while position + 7 <= len(content):
        if block - position % block < 7:  # no room for another part
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_runs_of_many_seeds_have_a_tracker_each(
    name: str, offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip(name, reason=f"needs {name}: pip install {name}")
    directory = tmp_path / "many"
    cfg = composed(
        "seeds=2", "agent.policy=auto", f"tracker={name}", *(["tracker.mode=offline"] if name == "wandb" else [])
    )
    assert begin_many(cfg, directory) == 0
    ids = [read_json(directory / f"seed{seed}" / TRACKER_FILE)[name] for seed in (0, 1)]
    assert len(set(ids)) == 2
    for seed in (0, 1):
        assert read_rows(directory / f"seed{seed}" / "metrics.jsonl")


def test_without_a_tracker_there_are_the_metrics_alone(offline: Path) -> None:
    record(offline, TrackerConfig("none"))
    assert sorted(path.name for path in offline.iterdir()) == ["config.yaml", "metrics.jsonl"]
    assert [row["step"] for row in read_rows(offline / "metrics.jsonl")] == [4, 8]


# -- one that fails --------------------------------------------------------------------------------------------------


class Broken:
    """Fails at its first row, or already at the start."""

    def __init__(self, calls: list[str], at_start: bool) -> None:
        self.calls = calls
        if at_start:
            raise ConnectionError("no network")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.calls.append(f"log {step}")
        raise ConnectionError("no network")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("at_start", [True, False])
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_start: bool
) -> None:
    calls: list[str] = []
    monkeypatch.setitem(trackers._STARTERS, "wandb", lambda *_: Broken(calls, at_start))
    record(offline, TrackerConfig("wandb"))
    assert calls == ([] if at_start else ["log 4"])
    told = capsys.readouterr().err
    assert told.count("The tracker wandb failed, and is left out from here on") == 1
    assert "ConnectionError: no network" in told
    assert [row["step"] for row in read_rows(offline / "metrics.jsonl")] == [4, 8]


def test_ctrl_c_in_a_tracker_ends_the_run(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(Broken):
        def log(self, step: int, values: dict[str, float]) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(trackers._STARTERS, "mlflow", lambda *_: Waiting([], False))
    with pytest.raises(KeyboardInterrupt):
        record(offline, TrackerConfig("mlflow"))


@pytest.mark.parametrize("name", ["wandb", TRACKER_FILE, "tensorboard"])
def test_a_tracker_writes_through_no_link(offline: Path, name: str) -> None:
    (offline / name).symlink_to(offline.parent / "outside")
    with pytest.raises(RunFileError, match="must be no link"):
        record(offline, TrackerConfig("none"))


# -- the config ------------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = composed("tracker=wandb")
    many = composed("tracker=mlflow", "seeds=2")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    directory = tmp_path / "run"
    with pytest.raises(InvalidArgumentError, match=r"got 'wandb': it needs the package wandb \(pip install wandb\)"):
        begin(one, directory)
    assert not directory.exists()
    with pytest.raises(InvalidArgumentError, match="pip install mlflow"):
        begin_many(many, directory)
    assert not directory.exists()
    check_tracker({"tracker": {"name": "none"}})


def test_trackers_load_nothing_until_they_start() -> None:
    code = "import sys, agents.runs.trackers; print({'torch', 'wandb', 'mlflow', 'tensorboard'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONF.parent)
    assert done.stdout.strip() == "set()"


def test_an_older_config_has_tensorboard() -> None:
    assert find_tracker({}) == TrackerConfig("tensorboard")
    assert find_tracker(plain(composed())) == TrackerConfig("tensorboard")
    with pytest.raises(InvalidArgumentError, match="tracker.name"):
        find_tracker({"tracker": {"name": "comet"}})


def test_a_run_that_goes_on_may_have_another_tracker(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with contextlib.redirect_stdout(None):
        assert begin(composed("tracker=none"), directory) == 0
        assert not (directory / "tensorboard").exists()
        assert go_on(directory, ["tracker=tensorboard", "total_timesteps=60"], ()) == 0
    assert (directory / "tensorboard").is_dir()
    values = with_overrides({"tracker": {"name": "wandb"}, "evaluation": {}}, ["tracker.mode=offline"])
    assert find_tracker(values) == TrackerConfig("wandb", mode="offline")
