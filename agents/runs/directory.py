"""A run directory: what may begin in it, what goes on from it, and what is taken back where nothing came of it."""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.checkpoint import Manifest, newest, read_manifest, recover, verify
from agents.runs.inputs import changes
from agents.runs.lock import Lock
from agents.runs.origin import ORIGIN
from agents.runs.recorder import METRICS_FILE
from agents.runs.trackers import TENSORBOARD, TRACKER_FILE, WANDB
from agents.runs.trust import config_text, read_config
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.files import RunFileError, read_text, remove, write_atomically

CONFIG_FILE = "config.yaml"
VERSIONS = "versions.json"
CHECKPOINT = "checkpoint"
CELLS = "cells"  # finished parts of a run that has several
MAX_RUNS_NAMED = 4
RUN_FILES = (
    CONFIG_FILE,
    VERSIONS,
    ORIGIN,
    METRICS_FILE,
    TENSORBOARD,
    WANDB,
    TRACKER_FILE,
    CHECKPOINT,
    "summary.json",
    "samples.json",
    "curves.png",
)
_HEADER = "# The config of a run of lmgym. A checkpoint beside it was saved with these numbers."
_SECTIONS = ("env", "agent", "sampler", "evaluation")
_SCALARS = ("task", "seed", "total_timesteps", "checkpoint_every", "device")
_STARTED = time.time()  # before Hydra makes the directory of a run


# -- beginning -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def empty_again(directory: Path) -> Iterator[None]:
    """Removes a directory where the block fails and leaves it empty, if it was made after this process began."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty, or not there
            if directory.stat().st_mtime >= _STARTED:
                directory.rmdir()
        raise


@contextlib.contextmanager
def new_run(directory: Path, values: Mapping[str, Any], files: Sequence[str] = RUN_FILES) -> Iterator[None]:
    """Holds a directory for a new run and writes its config there.

    Where the block fails before there is a row of metrics, a checkpoint or a finished part, what it has made is
    removed, and nothing else. A run that was killed so early, or before its first checkpoint, is begun anew.

    Args:
        directory: of the run. values: of its config. files: what a run of this command writes.

    Raises:
        LmGymError: for a directory that another process writes, or that holds a run or a file of such a name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with Lock(directory):
        _clear(directory, files)
        _remove_leftovers(directory, files)
        try:
            write_config(directory, values)
            yield
        except BaseException:
            if not _is_worth_keeping(directory):
                for name in files:  # none of which was there when the block began
                    remove(directory / name)
            raise


def write_config(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes `config.yaml`."""
    write_atomically(directory / CONFIG_FILE, f"{_HEADER}\n{config_text(values)}")


def _clear(directory: Path, files: Sequence[str]) -> None:
    """Sees to it that nothing of a run lies in a directory; what is left of one that has no checkpoint goes away.

    Raises:
        InvalidArgumentError: for anything else that would be overwritten.
    """
    there = [name for name in files if os.path.lexists(directory / name)]
    if not there:
        return
    if newest(directory / CHECKPOINT) is not None or _has_cells(directory):
        raise InvalidArgumentError(
            f"`hydra.run.dir` must be a directory without a run, and {directory} holds one: go on with that by "
            f"{shlex.quote(f'resume={directory}')}, or choose another."
        )
    if CONFIG_FILE not in there or read_text(directory / CONFIG_FILE).partition("\n")[0] != _HEADER:
        raise InvalidArgumentError(
            f"`hydra.run.dir` must be a directory without a run, and {directory} holds a file {there[0]} that is none "
            "of this command's: choose another."
        )
    print(f"The run in {directory} ended before its first checkpoint: it begins anew.", file=sys.stderr)
    for name in there:
        remove(directory / name)


def _is_worth_keeping(directory: Path) -> bool:
    """Whether a run has come so far that somebody may want to see it, or go on from it."""
    metrics = directory / METRICS_FILE
    has_rows = metrics.is_file() and metrics.stat().st_size > 0
    return os.path.lexists(directory / CHECKPOINT) or has_rows or _has_cells(directory)


def _has_cells(directory: Path) -> bool:
    return any((directory / CELLS).glob("*.json"))


def _remove_leftovers(directory: Path, files: Sequence[str]) -> None:
    """Puts the newest checkpoint in its place, and removes what a kill has left of what was being written."""
    recover(directory / CHECKPOINT)
    for name in (*files, "evaluation.json", "anatomy.json", "anatomy.png"):
        if name != CHECKPOINT:
            for path in directory.glob(f".{glob.escape(name)}.*.tmp"):
                remove(path)


# -- going on --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def resumed_run(directory: Path, files: Sequence[str] = RUN_FILES) -> Iterator[None]:
    """Holds the directory of a run that goes on, its newest checkpoint put in its place.

    Raises:
        LmGymError: for a directory that is no run's, that another process writes, or whose checkpoint is damaged.
    """
    check_is_run(directory)
    with Lock(directory):
        _remove_leftovers(directory, files)
        yield


def check_is_run(directory: Path) -> None:
    """Raises `InvalidArgumentError` unless a directory holds a config; the message names the runs that are near."""
    if (directory / CONFIG_FILE).is_file():
        return
    found = f"has no {CONFIG_FILE}" if directory.is_dir() else "there is none"
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    if inside:
        more = ", ..." if len(inside) > MAX_RUNS_NAMED else ""
        found = f"holds {len(inside)} runs: choose {', '.join(map(str, inside[:MAX_RUNS_NAMED]))}{more}"
    elif (directory.parent / CONFIG_FILE).is_file():
        found = f"is a part of one: give {directory.parent}"
    raise InvalidArgumentError(f"`{directory}` must be a run directory, and {found}.")


def read_values(directory: Path) -> dict[str, Any]:
    """The values in a run's `config.yaml`, of which every key that a command reads is there.

    Raises:
        LmGymError: naming the file.
    """
    check_is_run(directory)
    path = directory / CONFIG_FILE
    values = read_config(path)
    if isinstance(values.get("task"), dict):
        raise RunFileError(
            f"`task` in {path} must be a name, got names with values: it is of an older lmgym, where `env` was a part "
            "of `task`. Train it again."
        )
    for name in (*_SECTIONS, *_SCALARS):
        if name not in values:
            raise RunFileError(f"`{path}` must have a key {name!r}, and has none: put it back.")
        if name in _SECTIONS and not isinstance(values[name], dict):
            raise RunFileError(f"`{name}` in {path} must be names with values, got {values[name]!r}: put them back.")
    return values


def read_checkpoint(directory: Path, load: Callable[[Path], object] | None = None) -> Manifest:
    """Verifies a run's newest checkpoint, then loads it. It is read again where another process saves meanwhile.

    Args:
        directory: of the run; nothing in it is changed.
        load: takes the checkpoint's directory.

    Raises:
        LmGymError: where there is none, or one that is damaged or that cannot be loaded.
    """
    while True:
        path = newest(directory / CHECKPOINT)
        if path is None:
            raise InvalidArgumentError(
                f"`{directory}` must hold a checkpoint, and has none: the run ended before its first. Begin it anew, "
                "by the command that it was begun with."
            )
        before = _identity(path)
        try:
            manifest = verify(path)
            if load is not None:
                _load(path, load)
        except LmGymError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return manifest


def _identity(path: Path) -> Manifest | str:
    try:
        return read_manifest(path)
    except RunFileError as error:
        return str(error)


def _load(path: Path, load: Callable[[Path], object]) -> None:
    try:
        load(path)
    except LmGymError:
        raise
    except Exception as error:  # the files are as they were saved, so that what does not fit is the code
        raise RunFileError(
            f"`{path}` cannot be loaded by this version of lmgym and of its agent: {type(error).__name__}: {error}."
        ) from error


def changes_since(directory: Path, manifest: Manifest, now: Mapping[str, Any]) -> str | None:
    """What is not as it was when a checkpoint was saved, in words; None where all is.

    Args:
        directory: of the run. manifest: of the checkpoint. now: as `notes_of` gives it of the run's config.
    """
    if "config" not in manifest.notes:
        return f"The checkpoint in {directory} was not saved by a run, and may be of another config."
    found = changes(manifest.notes, now)
    more = f" And {len(found) - 3} more." if len(found) > 3 else ""
    return f"{directory} has changed. {' '.join(found[:3])}{more}" if found else None
