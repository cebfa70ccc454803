"""Which directories hold runs: those that are named, those in them, and those that a glob finds."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.runs.directory import CHECKPOINT, CONFIG_FILE
from agents.runs.sweeps import SEED_DIRECTORY
from agents.runs.trackers import TENSORBOARD
from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError
from lmgym.files import RunFileError, read_json

ERROR_FILE = "error.txt"  # what ended a run of a sweep
SUMMARY = "summary.json"  # of a run that has ended well
_ENDS = ("before", "after")
_OF_A_SUMMARY = frozenset({"before", "after", "train_seconds", "total_timesteps"})


def find_runs(directories: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The directories of training runs, in order, each once.

    Args:
        directories: of runs; of folders of runs, at any depth; or globs of these, such as `runs/**`. A run of many
            seeds stands for its seeds.

    Raises:
        InvalidArgumentError: where one of them holds no run.
    """
    found: dict[Path, Path] = {}
    for name in directories:
        runs = [run for path in _matches(name) for run in _runs_in(path, set())]
        if not runs:
            raise InvalidArgumentError(
                f"`runs` must name directories of training runs, and {os.fspath(name)} holds none: a run has a "
                f"{CONFIG_FILE} that names its agent."
            )
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    return list(found.values())


def read_summary(directory: Path) -> dict[str, Any]:
    """`summary.json` of a run; empty where it has none.

    Raises:
        RunFileError: for one that is damaged.
    """
    path = directory / SUMMARY
    if not path.is_file():
        return {}
    summary: Any = read_json(path)
    whole = isinstance(summary, dict) and summary.keys() >= _OF_A_SUMMARY
    if not whole or not all(isinstance(summary[when], dict) and "return" in summary[when] for when in _ENDS):
        raise RunFileError(f"`{path}` must be the summary of a run, and is not.")
    return dict(summary)


def is_finished(directory: Path) -> bool:
    """Whether a directory holds a run that has ended well, and whose config and summary can be read."""
    try:
        return (directory / CONFIG_FILE).is_file() and bool(read_summary(directory))
    except RunFileError:
        return False


def _matches(name: str | os.PathLike[str]) -> list[Path]:
    path = Path(name)
    if path.exists():
        return [path]
    matches = {Path(match) for match in glob.iglob(os.fspath(name), recursive=True)}
    outermost = (match for match in matches if match.parent not in matches)  # what is in a match is found with it
    return sorted((match for match in outermost if match.is_dir()), key=_natural)


def _runs_in(directory: Path, seen: set[Path]) -> list[Path]:
    """The runs in a directory, which may be one itself; `seen` are those above and before it, for links go in rings."""
    if not directory.is_dir() or directory.resolve() in seen:
        return []
    seen.add(directory.resolve())
    seeds = sorted((path.parent for path in directory.glob(f"{SEED_DIRECTORY}*/{CONFIG_FILE}")), key=_natural)
    if seeds:
        return seeds
    if (directory / CONFIG_FILE).is_file() or (directory / ERROR_FILE).is_file():
        return [directory] if _is_training(directory) else []
    below = (path for path in directory.iterdir() if path.is_dir() and path.name not in (CHECKPOINT, TENSORBOARD))
    return [
        run for path in sorted(below, key=_natural) if not path.name.startswith(".") for run in _runs_in(path, seen)
    ]


def _is_training(directory: Path) -> bool:
    """Whether a run trains an agent, and not a reward model; one whose config is damaged is shown as such."""
    try:
        config = read_config(directory / CONFIG_FILE)
    except RunFileError:
        return True
    return isinstance(config.get("agent"), dict) and "total_timesteps" in config and "labels" not in config


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts seed10 after seed9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]
