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
_COUNTS = ("total_timesteps", "forward_tokens", "backward_tokens")
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
    if not _is_summary(summary):
        raise RunFileError(f"`{path}` must be the summary of a run, and is not.")
    return dict(summary)


def read_run_config(directory: Path) -> dict[str, Any]:
    """`config.yaml` of a run.

    Raises:
        RunFileError: for one that is damaged, or of something else.
    """
    path = directory / CONFIG_FILE
    config = read_config(path)
    seed = config.get("seed")
    parts = (config.get(name) for name in ("env", "evaluation", "sampler"))
    if not all(part is None or isinstance(part, dict) for part in parts) or not (seed is None or _is_count(seed)):
        raise RunFileError(f"`{path}` must be the config of a run, and is not.")
    return config


def _is_summary(summary: Any) -> bool:
    """Whether all that is read of a summary has its kind."""
    if not isinstance(summary, dict) or not summary.keys() >= _OF_A_SUMMARY:
        return False
    graded = [summary[when] for when in ("before", "after")]
    scale = summary.get("optimum") or {}
    if not all(isinstance(part, dict) for part in (*graded, scale)):
        return False
    ends = (scale.get(name) for name in ("reference", "lower", "upper"))
    intervals = [x for part in graded for x in part.values()] + list(ends)
    counts = [summary[name] for name in _COUNTS if name in summary]
    return (
        all(isinstance(part.get("return"), dict) for part in graded)
        and all(x is None or (isinstance(x, dict) and all(map(_is_number, x.values()))) for x in intervals)
        and all(_is_number(summary.get(name)) for name in ("train_seconds", "peak_memory_bytes"))
        and _is_number(scale.get("value"))
        and all(map(_is_count, counts))
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or null, which stands for one that is not finite or not known."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        config = read_run_config(directory)
    except RunFileError:
        return True
    return isinstance(config.get("agent"), dict) and "total_timesteps" in config and "labels" not in config


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts seed10 after seed9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]
