"""Derives the optima of the suite again: `python -m agents.optimum [name ...]` compares them with what is stored.

With `--write` it stores them, in `lmgym/tasks/artefacts/<task>/optima.json`. Most are exact. For a task that no solver
reaches, PPO is trained on it, and V* is bounded from samples of that policy (docs/optimum.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agents.recorder import write_atomically
from agents.train import wait_politely
from lmgym.errors import InvalidArgumentError, LmGymError, unknown_name
from lmgym.tasks import StoredOptimum, Task, make_task, registered_tasks
from lmgym.tasks.base import ARTEFACTS

SPLITS = ("train", "test")
TOLERANCE = 1e-4  # between machines, in units of the score
TIMESTEPS = 150_000  # env steps that a proposal is trained for
SAMPLES, REPEATS = 131_072, 4  # responses a split, in independent runs
SEED = 0


def derive(task: Task) -> dict[str, StoredOptimum]:
    """V* of both splits: exact, or bounded with a policy trained on the first of them as the proposal."""
    from lmgym.optimum import solve

    try:
        return {split: solve(task, split=split).stored() for split in SPLITS}
    except InvalidArgumentError:  # more responses than can be written down
        return bounded(task)


def bounded(task: Task) -> dict[str, StoredOptimum]:
    """Bounds on V* from samples of a mixture of the reference and a policy trained on the task."""
    import gymnasium as gym
    import torch

    from agents.ppo import PPO, PPOConfig
    from lmgym.models.policy import CausalPolicy
    from lmgym.optimum.bounds import Mixture
    from lmgym.optimum.smc import sandwich

    envs: Any = gym.make_vec("lmgym/RLHF-v0", task=task, device="cpu")
    agent = PPO(envs, PPOConfig(), seed=SEED)
    agent.learn(TIMESTEPS)
    proposal = Mixture([agent.policy, CausalPolicy(task.reference("cpu"))], [0.9, 0.1])
    optima = {}
    for split in SPLITS:
        generator, particles = torch.Generator().manual_seed(SEED), SAMPLES // (REPEATS * len(task.prompts[split]))
        found = sandwich(task, split, proposal=proposal, particles=particles, repeats=REPEATS, generator=generator)
        optima[split] = found.stored()
    return optima


def store(name: str, optima: dict[str, StoredOptimum]) -> Path:
    """Puts the optima of a task beside those of its other settings."""
    path = Path(ARTEFACTS, name.partition("-")[0], "optima.json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    splits = {split: asdict(optimum) for split, optimum in optima.items()}
    kept[name] = {"version": registered_tasks()[name].version, "splits": splits}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(kept, indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Derives, prints, and compares or stores."""
    wait_politely()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tasks by name, or by what stands before the '-'; all if none")
    parser.add_argument("--write", action="store_true", help="store what was derived, instead of comparing")
    options = parser.parse_args(arguments)
    try:
        stale = [name for name in chosen(options.names) if not settle(name, options.write)]
    except LmGymError as error:
        sys.exit(f"{error}")
    if stale:
        sys.exit(
            f"Not as stored: {', '.join(stale)}. `python -m agents.optimum --write {' '.join(stale)}` stores them."
        )


def chosen(names: Sequence[str]) -> list[str]:
    """Names of tasks, each given whole or by what stands before the "-"."""
    known = list(registered_tasks())
    found = []
    for name in names or known:
        matching = [task for task in known if name in (task, task.partition("-")[0])]
        if not matching:
            raise unknown_name("task", name, known)
        found += matching
    return found


def settle(name: str, write: bool) -> bool:
    """Derives the optimum of a task, and stores it or says whether it is the stored one."""
    task = make_task(name)
    optima = derive(task)
    for split, found in optima.items():
        upper = "" if found.exact or found.upper is None else f" to {found.upper:.5f}"
        print(
            f"{name:18} {split:6} J_ref {found.reference:.5f}  V* {found.lower:.5f}{upper}  {found.method}", flush=True
        )
    if write:
        store(name, optima)
        return True
    return all(agrees(found, task.optima.get(split)) for split, found in optima.items())


def agrees(found: StoredOptimum, stored: StoredOptimum | None) -> bool:
    """Whether two derivations say the same: to rounding where exact, within a hundredth of the gain where sampled."""
    if stored is None or found.method != stored.method:
        return False
    near = TOLERANCE if found.exact else 0.01 * (stored.value - stored.reference) + TOLERANCE
    return abs(found.value - stored.value) <= near and abs(found.reference - stored.reference) <= max(near, 0.02)


if __name__ == "__main__":
    main()
