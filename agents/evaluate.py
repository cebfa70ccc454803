"""Grades a finished (or interrupted) run again, to the same table: `python -m agents.evaluate run=<run directory>`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from omegaconf import DictConfig

from agents.runs.command_line import run_command
from agents.runs.directory import changes_since, read_checkpoint
from agents.runs.inputs import notes_of
from agents.runs.report import table, write_json
from agents.runs.signals import Stoppable
from agents.runs.surroundings import prepare_process
from agents.runs.trust import trusted_modules
from agents.train import CONF, build, check_saved, grade, saved_config, summarise
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.files import RunFileError, read_json


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Loads a run's checkpoint, grades it and its reference, prints the table, and returns J."""
    prepare_process()
    try:
        with Stoppable():
            if cfg.run is None:
                raise InvalidArgumentError("`run` must be a run directory: python -m agents.evaluate run=<directory>.")
            return evaluate(Path(cfg.run), cfg.evaluation, trusted_modules(cfg.get("trust")))
    except KeyboardInterrupt:
        sys.exit(130)
    except LmGymError as error:
        sys.exit(f"{error}")


def evaluate(directory: Path, changed: Mapping[str, Any], trusted: Sequence[str]) -> float:
    """Grades a run, prints the table, and returns J; of its directory nothing but `evaluation.json` is written.

    Args:
        directory: of the run. changed: what `evaluation` has instead of what it was trained with, None for the same.
        trusted: as for `saved_config`.

    Raises:
        LmGymError: naming the file of the run that is missing or damaged.
    """
    from agents.algorithms.reference import Reference

    saved = saved_config(directory, trusted)
    warning = changes_since(directory, read_checkpoint(directory), notes_of(saved))
    if warning is not None:
        print(f"{warning} What follows is of what is there now.", file=sys.stderr)
    recorded = recorded_return(directory / "summary.json")
    saved["evaluation"] |= {name: value for name, value in changed.items() if value is not None}
    plan = check_saved(directory, saved)
    agent = build(plan)
    manifest = read_checkpoint(directory, agent.load)
    before = grade(plan, Reference(agent.envs))
    after = grade(plan, agent)
    summary = summarise(plan, before, after, manifest.notes.get("train_seconds", 0.0), agent)
    try:
        write_json(directory / "evaluation.json", summary)
    except OSError as error:  # the table is of use without
        print(f"{error.filename} could not be written: {error.strerror}", file=sys.stderr)
    print(table(summary))
    if recorded is not None:
        print(f"\nrecorded when it was trained: J = {recorded:.4f}; now: J = {summary['after']['return']['mean']:.4f}")
    return float(summary["after"]["return"]["mean"])


def recorded_return(path: Path) -> float | None:
    """J after training in a `summary.json`; None where there is none.

    Raises:
        RunFileError: for a file that has no such number.
    """
    if not path.exists():
        return None
    number: Any = read_json(path)
    for name in ("after", "return", "mean"):
        number = number.get(name) if isinstance(number, dict) else None
    if number is not None and type(number) not in (int, float):
        raise RunFileError(f"`after.return.mean` in {path} must be a number, got {number!r}: remove the file.")
    return number


if __name__ == "__main__":
    run_command(main)
