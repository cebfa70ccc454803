"""What `python -m agents.evaluate` does: grades a run again from its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.runs.cost import Cost
from agents.runs.directory import changes_since, read_checkpoint
from agents.runs.grading import grade, summarise
from agents.runs.inputs import notes_of
from agents.runs.plan import build, check_saved, saved_config
from agents.runs.report import table, write_json
from lmgym.files import RunFileError, read_json


def regrade(directory: Path, changed: Mapping[str, Any], trusted: Sequence[str]) -> float:
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
    notes = read_checkpoint(directory, agent.load).notes
    before = grade(plan, Reference(agent.envs))
    after = grade(plan, agent)
    summary = summarise(
        plan, before, after, Cost(notes.get("train_seconds", 0.0), notes.get("peak_memory_bytes")), agent
    )
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
