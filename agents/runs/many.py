"""What `python -m agents.train seeds=32` does: runs of 32 seeds in one process, each with a directory of its own.

The directory of the command holds `seed0` to `seed31`, and in each of them lies what a single run leaves.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from agents.runs.along import Along
from agents.runs.clock import Clock
from agents.runs.command_line import shell_command
from agents.runs.cost import Cost, PeakMemory
from agents.runs.directory import CONFIG_FILE, empty_again, new_run, resumed_run, write_config
from agents.runs.grading import grade
from agents.runs.inputs import notes_of
from agents.runs.origin import ORIGIN, find_origin
from agents.runs.plan import Plan, build, check, check_saved, plain
from agents.runs.recorder import Recorder
from agents.runs.report import write_json
from agents.runs.run import read_unchanged, versions, write_result
from agents.runs.saving import Saver
from agents.runs.signals import Interrupt
from agents.runs.sweeps import SEED_DIRECTORY, multirun_table
from agents.runs.trackers import check_tracker
from agents.runs.trust import trust_argument
from lmgym.errors import InvalidArgumentError, NotFiniteError
from lmgym.files import read_json

if TYPE_CHECKING:
    from agents.many_seeds import ManySeeds


@dataclass(frozen=True)
class _Run:
    """The run of one seed: what to do, where, and what its checkpoints note."""

    plan: Plan
    directory: Path
    notes: dict[str, Any]


def seed_directories(directory: Path) -> list[Path]:
    """Those of the runs in the directory of a run of many seeds, in the order of the seeds; none in any other."""
    found = {}
    for path in directory.glob(f"{SEED_DIRECTORY}*/{CONFIG_FILE}"):
        match = re.fullmatch(rf"{SEED_DIRECTORY}(\d+)", path.parent.name)
        if match:
            found[int(match[1])] = path.parent
    return [found[seed] for seed in sorted(found)]


def mean_return(directory: Path) -> float:
    """The mean over seeds of what the runs in a directory reached."""
    summaries = [path / "summary.json" for path in seed_directories(directory)]
    return statistics.fmean(read_json(path)["after"]["return"]["mean"] for path in summaries if path.is_file())


def begin_many(cfg: DictConfig, directory: Path) -> int:
    """New runs of several seeds; returns the exit code.

    Raises:
        LmGymError: for a config that cannot be, or a directory that holds such runs; no file is left.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(empty_again(directory))
        values = plain(cfg)
        check_tracker(values)
        plan = check(values)
        _check_stackable(plan)
        if there := seed_directories(directory):
            raise InvalidArgumentError(f"`hydra.run.dir` must be a directory without a run, and {there[0]} is one.")
        runs = []
        for seed in range(plan.seed, plan.seed + values["seeds"]):
            own = {**values, "seed": seed, "seeds": 1}
            path = directory / f"{SEED_DIRECTORY}{seed}"
            held.enter_context(empty_again(path))
            held.enter_context(new_run(path, own))
            write_json(path / "versions.json", versions())
            write_json(path / ORIGIN, find_origin())
            runs.append(_Run(replace(plan, seed=seed), path, notes_of(own)))
        return _train(runs, directory, resume=False)


def go_on_with_many(directory: Path, overrides: list[str], trusted: Sequence[str]) -> int:
    """Runs of several seeds that go on; returns the exit code. The arguments are those of `go_on`."""
    with contextlib.ExitStack() as held:
        runs = []
        for path in seed_directories(directory):
            held.enter_context(resumed_run(path))
            values, notes = read_unchanged(path, overrides, trusted)
            plan = check_saved(path, values)
            _check_stackable(plan)
            write_config(path, values)
            runs.append(_Run(plan, path, notes))
        return _train(runs, directory, resume=True)


def _check_stackable(plan: Plan) -> None:
    from agents.many_seeds import check_agent

    check_agent(plan.agent_class, plan.agent_config)


def _train(runs: Sequence[_Run], directory: Path, resume: bool) -> int:
    """Trains, evaluates and reports, as `agents.runs.run.train` does for one run."""
    from agents.algorithms.reference import Reference
    from agents.many_seeds import ManySeeds
    from lmgym.models.sharing import resolve_device

    agents: list[Any] = [build(run.plan) for run in runs]
    clock = Clock()
    memory = PeakMemory(resolve_device(runs[0].plan.settings["device"]))
    many = ManySeeds(agents)
    command = shell_command("agents.train", f"resume={directory}") + trust_argument(runs[0].plan.trust)
    savers = [
        Saver(agent, run.directory, run.plan.checkpoint_every, run.notes, command, clock=clock, memory=memory)
        for agent, run in zip(agents, runs, strict=True)
    ]
    if resume:
        for saver in savers:
            saver.load()
    try:
        before = [grade(run.plan, Reference(agent.envs)) for agent, run in zip(agents, runs, strict=True)]
        with Interrupt() as stop:
            costs = _learn(many, runs, savers, stop, resume)
        if stop.asked and any(x.num_timesteps < runs[0].plan.total_timesteps for x in agents if x not in many.failures):
            print(f"Stopped after {sum(x.num_timesteps for x in agents):,} tokens of all seeds. Go on with: {command}")
            return 130
        for run, agent, first, spent in zip(runs, agents, before, costs, strict=True):
            if spent is not None:
                write_result(run.plan, run.directory, agent, first, spent)
    except KeyboardInterrupt:
        print(f"\nStopped at once. What the last checkpoints hold goes on with: {command}", file=sys.stderr)
        raise
    print(f"\n{multirun_table(directory)}", flush=True)
    for agent, error in many.failures.items():
        print(f"seed {runs[agents.index(agent)].plan.seed}: {error}", file=sys.stderr)
    return 1 if many.failures else 0


def _learn(
    many: ManySeeds, runs: Sequence[_Run], savers: Sequence[Saver], stop: Interrupt, resume: bool
) -> list[Cost | None]:
    """Trains all agents until their budgets are spent or a stop is asked for, and saves them.

    Returns:
        What training has taken, of each; None for one that has failed.
    """
    total = runs[0].plan.total_timesteps
    with contextlib.ExitStack() as recorders:
        callbacks = {}
        for agent, run, saver in zip(many.agents, runs, savers, strict=True):
            begun = agent.num_timesteps if resume else None
            end = max(total, agent.num_timesteps)
            recorder = recorders.enter_context(
                Recorder(run.directory, end, begun, progress=run is runs[0], tracker=run.plan.tracker)
            )
            along = None if run.plan.evaluation.every is None else Along(run.plan, agent, recorder)
            callbacks[agent] = saver.start(recorder, stop, along)
        try:
            many.learn(total, callbacks)
        except Exception as error:
            print("\nTraining of all seeds failed.", file=sys.stderr)
            if not isinstance(error, NotFiniteError):  # what training had reached is worth nothing then
                for saver in savers:
                    saver.save_before(error)
            print(f"What was saved goes on with: {savers[0].go_on}", file=sys.stderr)
            raise
    return [None if agent in many.failures else saver.save() for agent, saver in zip(many.agents, savers, strict=True)]
