"""What `python -m agents.train` does: begins a run or goes on with one, trains, grades and reports."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig

import lmgym
from agents.runs.along import Along, solved_at
from agents.runs.command_line import shell_command
from agents.runs.config import CONF
from agents.runs.cost import Cost, PeakMemory
from agents.runs.directory import (
    CONFIG_FILE,
    changes_since,
    empty_again,
    new_run,
    read_checkpoint,
    read_values,
    resumed_run,
    write_config,
)
from agents.runs.grading import grade, samples, summarise
from agents.runs.inputs import notes_of
from agents.runs.launch import joined_processes
from agents.runs.origin import ORIGIN, find_origin
from agents.runs.picture import curves
from agents.runs.plan import Plan, build, check, check_saved, plain, saved_config
from agents.runs.recorder import METRICS_FILE, Recorder, read_rows
from agents.runs.report import samples_table, table, write_json
from agents.runs.saving import Saver
from agents.runs.signals import Interrupt
from agents.runs.trackers import check_tracker
from agents.runs.trust import read_config, trust_argument
from lmgym.errors import InvalidArgumentError
from lmgym.files import RunFileError

if TYPE_CHECKING:
    from agents.agent import Agent
    from lmgym.evaluation import Evaluation

RESUMABLE = ("total_timesteps", "checkpoint_every")
RESUMABLE_SECTIONS = ("evaluation", "budget", "tracker", "engine")  # and every key of these
PACKAGES = ("torch", "transformers", "gymnasium", "numpy", "hydra-core", "tokenizers")


def begin(cfg: DictConfig | dict[str, Any], directory: Path, command: str | None = None) -> int:
    """A new run; returns its exit code.

    Args:
        cfg: composed, or plain values. directory: of the run.
        command: that makes this run; that of the process if None.

    Raises:
        LmGymError: for a config that cannot be, or a directory that holds a run; no file is left.
    """
    with empty_again(directory):
        values = plain(cfg)
        check_tracker(values)
        plan = check(values)
        with new_run(directory, values):
            write_json(directory / "versions.json", versions())
            origin = find_origin()
            write_json(directory / ORIGIN, {**origin, "command": command or origin["command"]})
            return train(plan, directory, resume=False, notes=notes_of(values))


def go_on(directory: Path, overrides: list[str], trusted: Sequence[str]) -> int:
    """A run that goes on; returns its exit code.

    Args:
        directory: of the run. overrides: as for `with_overrides`. trusted: as for `saved_config`.

    Raises:
        LmGymError: for one that cannot.
    """
    with resumed_run(directory):
        values, notes = read_unchanged(directory, overrides, trusted)
        plan = check_saved(directory, values)
        write_config(directory, values)
        return train(plan, directory, resume=True, notes=notes)


def read_unchanged(
    directory: Path, overrides: list[str], trusted: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a run that goes on, with what is to change in it, and the notes of its checkpoints.

    Args:
        directory: of the run. overrides: as for `with_overrides`. trusted: as for `saved_config`.

    Raises:
        LmGymError: where something that the run depends on is not as it was.
    """
    saved = saved_config(directory, trusted)
    values = with_overrides(saved, overrides)
    check_tracker(values)
    notes = notes_of(saved)
    changed = changes_since(directory, read_checkpoint(directory), notes)
    if (directory / METRICS_FILE).exists():
        read_rows(directory / METRICS_FILE)  # a damaged row is named before anything loads
    if changed is not None:
        raise RunFileError(f"{changed} Put back what was there, or begin a new run.")
    return values, notes


def train(plan: Plan, directory: Path, resume: bool, notes: dict[str, Any] | None = None) -> int:
    """Trains, evaluates and reports; returns the exit code, 130 after Ctrl-C.

    Args:
        plan: what to do. directory: of the run. resume: goes on from its checkpoint.
        notes: that its checkpoints carry, as `notes_of` gives them of its config; None reads that there.
    """
    from agents.algorithms.reference import Reference
    from lmgym.models.sharing import resolve_device

    with joined_processes(plan.settings["device"]) as processes:
        agent = build(plan, processes)
        connect_engine(plan, agent)
        if notes is None:
            notes = notes_of(read_values(directory)) if (directory / CONFIG_FILE).is_file() else {}
        command = shell_command("agents.train", f"resume={directory}") + trust_argument(plan.trust)
        memory = PeakMemory(resolve_device(plan.settings["device"]))
        saver = Saver(agent, directory, plan.checkpoint_every, notes, command, plan.budget, memory=memory)
        if resume:
            saver.load()
        elif processes.count > 1:
            saver.save()  # what goes on from it, should a process be lost
        try:
            before = grade(plan, Reference(agent.envs))
            total = max(plan.total_timesteps, agent.num_timesteps)  # the last batch of a run may pass its end
            with (
                Recorder(directory, total, agent.num_timesteps if resume else None, tracker=plan.tracker) as recorder,
                Interrupt() as stop,
            ):
                along = None if plan.evaluation.every is None else Along(plan, agent, recorder)
                cost = saver.learn(plan.total_timesteps, recorder, stop, along)
            if stop.asked and agent.num_timesteps < plan.total_timesteps and not saver.is_spent():
                print(f"Stopped after {agent.num_timesteps:,} tokens. Go on with: {command}")
                return 130
            summary, rows = write_result(plan, directory, agent, before, cost)
        except KeyboardInterrupt:
            print(f"\nStopped at once. {saver.what_is_saved()}", file=sys.stderr)
            raise
        print(f"\n{samples_table(rows)}\n\n{table(summary)}\n\n{directory / 'curves.png'}")
        return 0


def connect_engine(plan: Plan, agent: Agent) -> None:
    """Has the engine of a plan, if it has one, sample an agent's batches.

    Raises:
        LmGymError: for an engine that cannot.
    """
    if plan.engine.url is None:
        return
    from agents.on_policy import OnPolicyAgent
    from agents.remote.connect import connect

    assert isinstance(agent, OnPolicyAgent)
    connect(agent, plan.engine)


def write_result(
    plan: Plan, directory: Path, agent: Agent, before: Evaluation, cost: Cost
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Grades a trained agent and writes what came of it; returns the summary and the samples.

    Args:
        plan: of the run. directory: its own. agent: that has been trained.
        before: the reference's grade. cost: what training has taken.
    """
    after = grade(plan, agent)
    summary = summarise(plan, before, after, cost, agent)
    summary["solved_at"] = solved_at(read_rows(directory / METRICS_FILE), summary)
    rows = samples(agent.envs.engine.lm, before, after)
    write_json(directory / "summary.json", summary)
    write_json(directory / "samples.json", rows)
    curves(directory / METRICS_FILE, summary, directory / "curves.png")
    return summary, rows


def with_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The config of a run that goes on, with what may change then.

    Args:
        values: of its config.yaml. overrides: `key=value` each, as on the command line.

    Raises:
        InvalidArgumentError: if another key is to change.
    """
    values = {**values, **{name: dict(values.get(name) or {}) for name in RESUMABLE_SECTIONS}}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in ("resume", "trust"):
            continue
        if key == "tracker":
            values["tracker"] = read_config(CONF / "tracker" / f"{value}.yaml")
            continue
        section, dot, name = key.partition(".")
        if key not in RESUMABLE and not (dot and section in RESUMABLE_SECTIONS):
            raise InvalidArgumentError(
                f"`{key}` must be as it was when the run began: with `resume`, only {', '.join(RESUMABLE)}, "
                f"{', '.join(f'{name}.*' for name in RESUMABLE_SECTIONS)} and tracker may change."
            )
        if dot:
            values[section][name] = yaml.safe_load(value)
        else:
            values[key] = yaml.safe_load(value)
    return values


def versions() -> dict[str, str]:
    """What ran: Python and the packages that matter."""
    found = {"python": platform.python_version(), "lmgym": lmgym.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # on the path, and not installed
            found[name] = importlib.metadata.version(name)
    return found
