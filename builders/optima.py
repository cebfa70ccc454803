"""Derives the optima of the suite again: `python -m builders.optima [name ...]` compares them with what is stored.

With `--write` it stores them, in `lmgym/tasks/artefacts/<task>/optima.json`. Most are exact. Where a
task has too many responses for that, a proposal is fitted to the optimal policy, and V* is bounded from both sides with
draws of it (docs/optimum.md).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from agents.runs.surroundings import prepare_process
from lmgym.errors import InvalidArgumentError, LmGymError, unknown_name
from lmgym.files import write_atomically
from lmgym.tasks import StoredOptimum, Task, make_task, registered_tasks
from lmgym.tasks.stored import ARTEFACTS

SPLITS = ("train", "test")
TOLERANCE = 1e-4  # between exact optima of two machines, in units of the score
MAX_DISTANCE = 0.002  # of the gain, between the intervals of two derivations from samples
MAX_REFERENCE_DISTANCE = 0.02  # between two estimates of J of the reference, in units of the score
DRAWS = {"train": 32, "test": 128}  # a prompt and repeat; by assumption no weight exceeds so many times the mean
REFERENCE_DRAWS = {"train": 64, "test": 512}  # a prompt, for J of the reference
SEED = 0


def derive(task: Task) -> dict[str, StoredOptimum]:
    """V* of both splits: exact, or bounded from both sides with draws of a proposal that is fitted to pi*."""
    from lmgym.optimum import solve

    try:
        return {split: solve(task, split=split).stored() for split in SPLITS}
    except InvalidArgumentError:  # more responses than can be enumerated
        return derive_bounds(task)


def derive_bounds(task: Task) -> dict[str, StoredOptimum]:
    """Bounds on V* of both splits by importance sampling."""
    import torch

    from builders.proposal import fit_proposal
    from lmgym.optimum.importance import importance_bounds

    proposal = fit_proposal(task, torch.Generator().manual_seed(SEED), verbose=True)
    optima = {}
    for split in SPLITS:
        found = importance_bounds(
            task,
            split,
            proposal,
            draws=DRAWS[split],
            max_ratio=DRAWS[split],
            reference_draws=REFERENCE_DRAWS[split],
            generator=torch.Generator().manual_seed(SEED + 1),
        )
        optima[split] = found.stored()
    return optima


def store(name: str, optima: dict[str, StoredOptimum]) -> Path:
    """Puts the optima of a task beside those of its other settings."""
    path = Path(ARTEFACTS, name.partition("-")[0], "optima.json")
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    splits = {split: asdict(optimum) for split, optimum in optima.items()}
    stored[name] = {"version": registered_tasks()[name].version, "splits": splits}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(stored, indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Derives, prints, and compares or stores."""
    prepare_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tasks by name, or by what stands before the '-'; all if none")
    parser.add_argument("--write", action="store_true", help="store what was derived, instead of comparing")
    options = parser.parse_args(arguments)
    try:
        stale = [name for name in find_tasks(options.names) if not update(name, options.write)]
    except LmGymError as error:
        sys.exit(f"{error}")
    if stale:
        sys.exit(
            f"Not as stored: {', '.join(stale)}. `python -m builders.optima --write {' '.join(stale)}` stores them."
        )


def find_tasks(names: Sequence[str]) -> list[str]:
    """Names of tasks, each given whole or by what stands before the "-"."""
    known = [name for name, registered in registered_tasks().items() if not registered.on_hub]
    found = []
    for name in names or known:
        matching = [task for task in known if name in (task, task.partition("-")[0])]
        if not matching:
            raise unknown_name("task", name, known, listed_by="`lmgym.suite()`")
        found += matching
    return found


def update(name: str, write: bool) -> bool:
    """Derives the optimum of a task, and stores it (`write`) or returns whether it is the stored one."""
    task = make_task(name)
    optima = derive(task)
    for split, found in optima.items():
        print(describe(name, split, found), flush=True)
    if write:
        store(name, optima)
        return True
    return all(agrees(found, task.optima.get(split)) for split, found in optima.items())


def describe(name: str, split: str, found: StoredOptimum) -> str:
    """One line of numbers, and one of what they assume."""
    line = f"{name:18} {split:6} J_ref {found.reference:.5f}  V* {found.lower:.5f}"
    if found.upper is not None and not found.exact:
        line += f" to {found.upper:.5f} ({100 * found.width:.1f} % of the gain)"
    line += f"  {found.method}"
    if found.assumption:
        line += f"\n{'':25} The upper bound assumes this: {found.assumption}."
    return line


def agrees(found: StoredOptimum, stored: StoredOptimum | None) -> bool:
    """Whether two derivations agree: up to rounding if exact, and with intervals that nearly overlap if sampled."""
    if stored is None or found.method != stored.method:
        return False
    if found.exact:
        return abs(found.value - stored.value) <= TOLERANCE and abs(found.reference - stored.reference) <= TOLERANCE
    max_distance = MAX_DISTANCE * (stored.value - stored.reference)
    distance = max(found.lower, stored.lower) - min(_upper(found), _upper(stored))
    return distance <= max_distance and abs(found.reference - stored.reference) <= MAX_REFERENCE_DISTANCE


def _upper(optimum: StoredOptimum) -> float:
    return math.inf if optimum.upper is None else optimum.upper


if __name__ == "__main__":
    main()
