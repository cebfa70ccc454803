"""Where the metrics of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, or nowhere.

The run directory stays the truth: a tracker is told what is written there, and nothing is read back from it. One that
fails is left out from there on, with a warning, and training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from agents.runs.config import validated
from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.files import RunFileError, read_json, refuse_link, write_atomically

Name = Literal["tensorboard", "wandb", "mlflow", "none"]

TENSORBOARD = "tensorboard"
WANDB = "wandb"
TRACKER_FILE = "tracker.json"  # the run's name at its tracker, by which it goes on there
_SQLITE = "sqlite:///"
_CONFIG = "config.yaml"
_MAX_PARAMETER = 500  # characters, which older servers of MLflow take
_PARAMETERS_AT_ONCE = 100  # that MLflow takes in one call


@dataclass(frozen=True)
class TrackerConfig:
    """Which tracker, and where."""

    name: Name = "tensorboard"
    project: str = "lmgym"  # of Weights & Biases; MLflow calls it an experiment
    mode: Literal["online", "offline"] = "online"  # of Weights & Biases


class Tracker(Protocol):
    """What is told of every row of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes up a row.

        Args:
            step: env steps so far. values: by name, such as `rollout/return`; some may not be finite.
        """

    def close(self) -> None:
        """Ends the run; nothing comes after."""


def find_tracker(values: Mapping[str, Any]) -> TrackerConfig:
    """The tracker of a whole config; TensorBoard in one that names none.

    Raises:
        LmGymError: naming the key, what was expected and what came.
    """
    return validated(TrackerConfig, values.get("tracker") or {}, "tracker")


def check_tracker(values: Mapping[str, Any]) -> None:
    """Raises `InvalidArgumentError` where the package of a config's tracker is not there; nothing is loaded."""
    name = find_tracker(values).name
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InvalidArgumentError(
            f"`tracker` must be one that is installed, got {name!r}: it needs the package {name} (pip install {name})."
        )


def start(config: TrackerConfig, directory: Path, resume_at: int | None = None) -> Tracker:
    """Begins the run of a directory at its tracker, or goes on with it.

    Args:
        config: which tracker. directory: of the run; its `config.yaml` is shown, if there is one.
        resume_at: the env step that a resumed run goes on from; None begins one.

    Raises:
        RunFileError: for a link, or a file of another kind, where the tracker is to write.
    """
    for name in (TENSORBOARD, WANDB, TRACKER_FILE):
        refuse_link(directory / name)
    if (directory / TENSORBOARD).is_file():
        raise RunFileError(f"`{directory / TENSORBOARD}` must be a directory, and is a file: move it away.")
    return _Guarded(config.name, lambda: _STARTERS[config.name](config, directory, resume_at))


class _Guarded:
    """A tracker that may fail: from then on it is left out, and a line says so once."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._try(lambda: self._set(make()))

    def _set(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def log(self, step: int, values: Mapping[str, float]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(lambda: tracker.log(step, values))

    def close(self) -> None:
        tracker = self._tracker
        self._tracker = None
        if tracker is not None:
            self._try(tracker.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except LmGymError:
            raise
        except Exception as error:
            self._tracker = None
            print(
                f"\nThe tracker {self._name} failed, and is left out from here on; metrics.jsonl has all metrics. "
                f"{type(error).__name__}: {error}",
                file=sys.stderr,
            )


class _Nothing:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _TensorBoard:
    def __init__(self, config: TrackerConfig, directory: Path, resume_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        # TensorBoard hides what an earlier event file says from `purge_step` on.
        purge_step = None if resume_at is None else resume_at + 1
        self._writer = SummaryWriter(log_dir=str(directory / TENSORBOARD), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run at Weights & Biases, whose own count of steps only grows: env steps are a metric beside the others."""

    def __init__(self, config: TrackerConfig, directory: Path, resume_at: int | None) -> None:
        import wandb

        known = _known_id(directory, WANDB) if resume_at is not None else None
        self._run = wandb.init(
            project=config.project,
            name=_run_name(directory),
            id=known,
            resume=None if known is None else "allow",
            config=_config_of(directory),
            dir=str(directory),
            mode=config.mode,
            reinit="create_new",  # several runs in one process
            settings=wandb.Settings(silent=True, console="off"),  # the terminal is the progress bar's
        )
        self._run.define_metric("*", step_metric="step")
        _note_id(directory, WANDB, self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of an experiment of MLflow, by a client of its own: several may run in one process.

    It is on the server or in the database that MLFLOW_TRACKING_URI names, or else in `runs/mlflow.db`.
    """

    def __init__(self, config: TrackerConfig, directory: Path, resume_at: int | None) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or _default_database()
        with _one_at_a_time(uri):
            self._client = MlflowClient(uri)
            self._begin(config, directory, resume_at)

    def _begin(self, config: TrackerConfig, directory: Path, resume_at: int | None) -> None:
        known = _known_id(directory, "mlflow") if resume_at is not None else None
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(config.project)
        experiment = self._client.create_experiment(config.project) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=_run_name(directory)).info.run_id
        _note_id(directory, "mlflow", self._id)
        self._log_parameters(_flatten(_config_of(directory)))

    def _log_parameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [Param(name, str(value)[:_MAX_PARAMETER]) for name, value in values.items()]
        for first in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=parameters[first : first + _PARAMETERS_AT_ONCE])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        )

    def close(self) -> None:
        self._client.set_terminated(self._id)


_STARTERS: dict[str, Callable[[TrackerConfig, Path, int | None], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "none": lambda config, directory, resume_at: _Nothing(),
}


def _run_name(directory: Path) -> str:
    """What a tracker calls a run: its directory, and of one seed among several that above it too."""
    path = directory.absolute()
    return f"{path.parent.name}/{path.name}" if path.name.removeprefix("seed").isdigit() else path.name


def _config_of(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    return read_config(path) if path.is_file() else {}


def _flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"agent.lr": 0.001, ...}` of `{"agent": {"lr": 0.001}, ...}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{before}{name}."))
        else:
            flat[f"{before}{name}"] = value
    return flat


def _default_database() -> str:
    path = Path("runs").absolute() / "mlflow.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"{_SQLITE}{path}"


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Holds the directory of a database in a file: MLflow makes one in many steps, and a second process breaks it."""
    if not uri.startswith(_SQLITE):
        yield
        return
    descriptor = os.open(Path(uri.removeprefix(_SQLITE)).absolute().parent, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):  # there are systems without locks
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _known_id(directory: Path, name: str) -> str | None:
    """The run's id at a tracker of this name, if it has been there."""
    path = directory / TRACKER_FILE
    known = read_json(path) if path.is_file() else {}
    found = known.get(name) if isinstance(known, dict) else None
    return found if isinstance(found, str) else None


def _note_id(directory: Path, name: str, run_id: str) -> None:
    path = directory / TRACKER_FILE
    known = read_json(path) if path.is_file() else {}
    write_atomically(path, json.dumps({**known, name: run_id}) + "\n")
