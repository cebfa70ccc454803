"""The runs of a comparison: their configs, checked before torch loads, and their directories."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import CompactHydraException
from omegaconf.errors import OmegaConfBaseException

from agents.comparison.directories import is_finished
from agents.comparison.names import find_labels, problem_name
from agents.comparison.protocol import Protocol
from agents.faults.config import KNOBS
from agents.runs.config import CONF, explained
from agents.runs.directory import CONFIG_FILE
from agents.runs.plan import check_values_of_run, plain
from agents.runs.sweeps import file_name
from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError, LmGymError

_COMPARED = ("task", "env", "agent", "sampler", "seed", "total_timesteps", "budget", "evaluation", *KNOBS)


@dataclass(frozen=True)
class Setting:
    """An agent with what is varied of it.

    Attributes:
        agent: its name. values: `key=value` each, beside what all runs have in common.
    """

    agent: str
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As it was typed."""
        return " ".join([self.agent, *self.values])


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        setting: of the agent. task, seed: of the run.
        values: its config. arguments: of `agents.train`, for the same run alone.
        directory: where it goes.
    """

    setting: Setting
    task: str
    seed: int
    values: dict[str, Any]
    arguments: tuple[str, ...]
    directory: Path

    @property
    def is_finished(self) -> bool:
        """Whether it has been run to its end, and what it left can be read."""
        return is_finished(self.directory)

    @property
    def problem(self) -> str:
        """The task with what is changed of it, as the report calls it."""
        return problem_name(self.values)


def settings_of(protocol: Protocol) -> list[Setting]:
    """Every agent with every combination of what is varied."""
    keys = [key for key, _ in protocol.varied]
    combinations = list(itertools.product(*(values for _, values in protocol.varied)))
    return [
        Setting(agent, tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True)))
        for agent in protocol.agents
        for values in combinations
    ]


def make_cells(
    protocol: Protocol, settings: Iterable[Setting], seeds: Sequence[int], out: Path, tasks: Sequence[str] | None = None
) -> list[Cell]:
    """The runs of some settings on tasks with seeds: all of the first seed, then all of the second, and so on.

    Args:
        protocol: what all runs have in common. settings: of the agents. seeds: of the runs. out: where they go.
        tasks: on which; those of the protocol if None.

    Raises:
        InvalidArgumentError: with all that is wrong in any of them.
    """
    found: list[Cell] = []
    wrong: dict[str, None] = {}
    for setting in settings:
        try:
            composed = compose(protocol, setting)
        except InvalidArgumentError as error:
            wrong[str(error)] = None
            continue
        for task in protocol.tasks if tasks is None else tasks:
            values = {**composed, "task": task}
            try:
                check_values_of_run(values)
            except LmGymError as error:
                wrong[f"{setting} on {task}: {error}"] = None
            found += [_make_cell(protocol, setting, values, seed, out) for seed in seeds]
    if wrong:
        raise InvalidArgumentError("\n".join(wrong))
    found.sort(key=lambda cell: seeds.index(cell.seed))
    for cell in found:
        _check_same(cell, protocol)
    return found


def labels_of(cells: Sequence[Cell]) -> list[str]:
    """What each run is called, in the table of runs and in the report: `ppo lr=1e-3`."""
    return find_labels([cell.values for cell in cells])


def check_distinct(cells: Sequence[Cell]) -> None:
    """Raises `InvalidArgumentError` where two runs of one seed would be the same one."""
    seen: dict[tuple[str, str, int], Cell] = {}
    for label, cell in zip(labels_of(cells), cells, strict=True):
        other = seen.setdefault((label, cell.problem, cell.seed), cell)
        if other is not cell:
            raise InvalidArgumentError(
                f"`{other.setting}` and `{cell.setting}` must be different runs, and are one and the same: vary what "
                "makes a difference, and each value once."
            )


def _make_cell(protocol: Protocol, setting: Setting, values: Mapping[str, Any], seed: int, out: Path) -> Cell:
    task = str(values["task"])
    words = [setting.agent, *(_short(value).replace("=", "") for value in setting.values), task, str(seed)]
    arguments = (f"agent={setting.agent}", f"task={task}", f"seed={seed}", *protocol.overrides, *setting.values)
    own = {**copy.deepcopy(dict(values)), "seed": seed}
    return Cell(setting, task, seed, own, arguments, out / "-".join(map(file_name, words)))


def compose(protocol: Protocol, setting: Setting) -> dict[str, Any]:
    """The config of a setting, of whatever task and seed.

    Raises:
        InvalidArgumentError: for a key that does not exist, with the nearest one.
    """
    overrides = [f"agent={setting.agent}", *protocol.overrides, *setting.values]
    if protocol.config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{protocol.config_dir}]")
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return plain(hydra.compose("train", overrides=overrides))
    except CompactHydraException as error:
        raise InvalidArgumentError(f"agents={setting.agent}: {explained(error)}") from error
    except (LmGymError, OmegaConfBaseException) as error:
        raise InvalidArgumentError(f"agents={setting.agent}: {error}") from error


def _check_same(cell: Cell, protocol: Protocol) -> None:
    """Raises `InvalidArgumentError` where the directory of a run holds one of another config."""
    path = cell.directory / CONFIG_FILE
    if not path.is_file():
        return
    saved = _leaves(read_config(path))
    default: dict[str, Any] | None = None
    for key, planned in _leaves(cell.values).items():
        if key not in saved:  # a key that is younger than the run: it did what the default does
            default = default or _leaves(compose(Protocol(config_dir=protocol.config_dir), Setting(cell.setting.agent)))
        before = saved[key] if key in saved else (default or {}).get(key)
        if before != planned:
            raise InvalidArgumentError(
                f"`out` must be a directory of runs like these, and {cell.directory} has {key}={before}, not "
                f"{planned}: choose another."
            )


def _leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same, by dotted key."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [(name, values[name]) for name in _COMPARED if name in values]
    for key, value in waiting:
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}", part) for name, part in value.items()]
        else:
            found[key] = value
    return found


def _short(override: str) -> str:
    """`lr=1e-3` of `agent.lr=1e-3`."""
    key, _, value = override.partition("=")
    return f"{key.lstrip('+').rpartition('.')[2]}={value}"
