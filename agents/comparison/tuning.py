"""Tuning without cheating: the winner of a search is run again, on seeds that the search has not seen.

Every agent gets the same number of settings, the first of them its defaults, and the same draws for keys of the same
name. A setting is tried on tuning seeds. What is reported are the runs of the winners on the reported seeds, never
the score of the search, which is too high for having been chosen. Beside the defaults that shows what tuning is worth,
and with a winner for each task how sensitive an agent is to its numbers (Adkins et al. 2024, arXiv 2412.07165).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from agents.comparison.directories import read_summary
from agents.comparison.names import own_task
from agents.comparison.plan import Cell, Setting, compose, make_cells
from agents.comparison.protocol import Protocol
from agents.comparison.spaces import Space
from agents.runs.report import write_json
from lmgym.errors import InvalidArgumentError

if TYPE_CHECKING:
    from agents.comparison.sensitivity import Sensitivity

TUNING_FILE = "tuning.json"
FIRST_TUNING_SEED = 1_000_000  # reported seeds are below; all streams of a run come from its seed by SeedSequence
_STREAM = 20_412_071  # of the settings that are drawn


@dataclass(frozen=True)
class Trial:
    """A setting of an agent that is tried.

    Attributes:
        agent: its name. values: `key=value` each; none are the defaults. score: its mean share of the gain over tasks.
        by_task: the same of each task.
    """

    agent: str
    values: tuple[str, ...]
    score: float = -math.inf
    by_task: tuple[tuple[str, float], ...] = ()


def tuning_seeds(protocol: Protocol) -> tuple[int, ...]:
    """The seeds of the trials.

    Raises:
        InvalidArgumentError: where a reported seed is one of them.
    """
    seeds = tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + protocol.tuning_seeds))
    if set(seeds) & set(protocol.seeds):
        raise InvalidArgumentError(f"`seeds` must be below {FIRST_TUNING_SEED}: those above are for tuning.")
    return seeds


def draw_trials(protocol: Protocol) -> list[Trial]:
    """As many settings for every agent.

    Raises:
        InvalidArgumentError: for a key that none of the agents has, with the nearest one; or where values are varied.
    """
    if protocol.varied:
        raise InvalidArgumentError("`tune` must be given without keys of several values: add them to what is tuned.")
    rng = np.random.default_rng(np.random.SeedSequence(_STREAM))
    drawn = [[(space, space.draw(rng)) for space in protocol.tune] for _ in range(protocol.trials - 1)]
    trials = []
    unused = {space.key: "" for space in protocol.tune}
    for agent in protocol.agents:
        own = [space for space in protocol.tune if not _problem(protocol, agent, space)]
        for space in protocol.tune:
            if space in own:
                unused.pop(space.key, None)
            elif space.key in unused:
                unused[space.key] = _problem(protocol, agent, space)
        trials.append(Trial(agent, ()))
        for values in drawn:
            trials.append(Trial(agent, tuple(f"{space.key}={value}" for space, value in values if space in own)))
    if unused:
        raise InvalidArgumentError("\n".join(f"`tune`: {problem}" for problem in unused.values()))
    return trials


def _problem(protocol: Protocol, agent: str, space: Space) -> str:
    """Why an agent cannot be given values of a space, or ""."""
    try:
        compose(protocol, Setting(agent, (f"{space.key}={space.values[0]}",)))
    except InvalidArgumentError as error:
        return str(error)
    return ""


class Search:
    """A search over trials, and the runs of what it has chosen.

    Args:
        trials: as many for every agent. cells: their runs, on tuning seeds.

    Attributes:
        tuned: the runs of each agent's best setting over all tasks, on the reported seeds.
        tuned_by_task: the runs of its best setting on each task.
    """

    def __init__(self, trials: Sequence[Trial], cells: Sequence[Cell]) -> None:
        self.trials = list(trials)
        self.cells = list(cells)
        self.tuned: list[Cell] = []
        self.tuned_by_task: list[Cell] = []

    def choose(self, protocol: Protocol, out: Path) -> None:
        """Chooses the best settings, once the runs of the trials are through."""
        self.trials = score_trials(self.trials, self.cells, protocol.tasks)
        for agent in protocol.agents:
            best = Setting(agent, best_trial(self.trials, agent).values)
            self.tuned += make_cells(protocol, [best], protocol.seeds, out)
            for task in protocol.tasks:
                best = Setting(agent, best_trial(self.trials, agent, task).values)
                self.tuned_by_task += make_cells(protocol, [best], protocol.seeds, out, [task])

    def found(self, defaults: Sequence[Cell]) -> list[Sensitivity]:
        """What tuning has made of each agent, once all runs are through; `defaults` are those on the reported seeds."""
        from agents.comparison.sensitivity import Sensitivity

        tasks = list(dict.fromkeys(cell.task for cell in defaults))
        found = []
        for agent in dict.fromkeys(cell.setting.agent for cell in defaults):
            several = {"defaults": defaults, "tuned": self.tuned, "tuned_by_task": self.tuned_by_task}
            shares = {
                kind: mean_shares([cell for cell in cells if cell.setting.agent == agent])
                for kind, cells in several.items()
            }
            best_by_task = {task: best_trial(self.trials, agent, task).values for task in tasks}
            trials = sum(trial.agent == agent for trial in self.trials)
            best = best_trial(self.trials, agent).values
            found.append(Sensitivity(agent, trials=trials, best=best, best_by_task=best_by_task, **shares))
        return found

    def write(self, found: Sequence[Sensitivity], out: Path) -> None:
        """Writes `tuning.json`: every trial, and what came of the winners."""
        noted = [x.as_values() for x in found]
        write_json(out / TUNING_FILE, {"trials": list(map(asdict, self.trials)), "reported": noted})


def begin_search(protocol: Protocol, out: Path) -> Search:
    """The search of a protocol, whose runs are still to come.

    Args:
        protocol: of the comparison. out: where the runs of the trials go.

    Raises:
        LmGymError: for what cannot be tuned.
    """
    trials = draw_trials(protocol)
    settings = dict.fromkeys(Setting(trial.agent, trial.values) for trial in trials)
    return Search(trials, make_cells(protocol, settings, tuning_seeds(protocol), out))


def mean_shares(cells: Sequence[Cell]) -> list[float]:
    """What each seed has reached on average over tasks; a run that failed counts as the reference, as in the report."""
    from agents.comparison.study import FAILURE_COUNTS_AS

    by_seed: dict[int, list[float]] = {}
    for cell in cells:
        share = share_of_run(cell)
        by_seed.setdefault(cell.seed, []).append(share if math.isfinite(share) else FAILURE_COUNTS_AS)
    return [fmean(shares) for shares in by_seed.values()]


def score_trials(trials: Sequence[Trial], cells: Sequence[Cell], tasks: Sequence[str]) -> list[Trial]:
    """The trials with what their runs have reached; a run that failed counts as minus infinity."""
    scored = []
    for trial in trials:
        of_trial = [cell for cell in cells if cell.setting == Setting(trial.agent, trial.values)]
        by_task = []
        for task in tasks:
            shares = [share_of_run(cell) for cell in of_trial if cell.task == task]
            by_task.append((task, fmean(shares) if shares else -math.inf))
        score = fmean(score for _, score in by_task)
        scored.append(Trial(trial.agent, trial.values, score, tuple(by_task)))
    return scored


def share_of_run(cell: Cell) -> float:
    """The share of the gain that a run has reached, its return where V* is not known, and minus infinity of none."""
    from agents.comparison.scales import regraded

    if not cell.is_finished:
        return -math.inf
    after = regraded(read_summary(cell.directory), own_task(cell.values))["after"]
    found = after["return"] if after.get("normalised") is None else after["normalised"]
    return -math.inf if found["mean"] is None else float(found["mean"])


def best_trial(trials: Sequence[Trial], agent: str, task: str | None = None) -> Trial:
    """The winner of an agent, over all tasks or on one; of equal ones the first, which may be the defaults."""
    own = [trial for trial in trials if trial.agent == agent]
    return max(own, key=lambda trial: trial.score if task is None else dict(trial.by_task)[task])
