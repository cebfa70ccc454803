"""What every process of a run but the first does: it trains along, and writes and says nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from agents.distributed import Processes, ProcessLostError
from agents.runs.directory import read_checkpoint
from agents.runs.launch import joined_processes
from agents.runs.plan import build, check, plain, saved_config
from agents.runs.reward_plan import check_reward, saved_reward_values
from agents.runs.reward_run import plain_values, train_along
from agents.runs.run import with_overrides
from agents.runs.signals import Stops
from lmgym.errors import InvalidArgumentError, LmGymError, NotFiniteError

_SAID_BY_THE_FIRST = (InvalidArgumentError, NotFiniteError, ProcessLostError)


def follow(cfg: DictConfig, directory: Path | None, overrides: list[str], trusted: Sequence[str]) -> None:
    """Trains along with the first process, to the same weights; what cannot be ends it without a word.

    The first process says what is wrong with a config, and that a process was lost. It alone acts on Ctrl-C, for all.

    Args:
        cfg: composed, of a new run. directory: of a run that goes on; None is a new one.
        overrides, trusted: of a run that goes on (`agents.runs.run.go_on`).
    """
    try:
        values: Any = cfg
        if directory is not None:
            values = with_overrides(saved_config(directory, trusted), overrides)
        plan = check(plain(values))
    except LmGymError:
        sys.exit(1)
    with joined_processes(plan.settings["device"]) as processes, Stops(), _without_a_word(processes):
        agent = build(plan, processes)
        if directory is not None:
            read_checkpoint(directory, agent.load)
        if processes.all_agree(True):  # the first knows whether the budget is spent
            agent.learn(plan.total_timesteps)


def follow_reward(cfg: DictConfig, directory: Path | None) -> None:
    """The same of `agents.reward`.

    Args:
        cfg: composed, of a new run. directory: of a run that goes on; None is a new one.
    """
    try:
        plan = check_reward(plain_values(cfg) if directory is None else saved_reward_values(directory))
    except LmGymError:
        sys.exit(1)
    with joined_processes(plan.device) as processes, Stops(), _without_a_word(processes):
        train_along(plan, processes, directory)


@contextlib.contextmanager
def _without_a_word(processes: Processes) -> Iterator[None]:
    """Ends the process where the block fails, without a word where the first process says why."""
    try:
        yield
    except LmGymError as error:
        if not isinstance(error, _SAID_BY_THE_FIRST):
            print(f"Process {processes.rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
