"""What `python -m agents.compare` is asked to do, read from its arguments or from a file, before torch loads."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from agents.comparison.protocol_file import read_protocol
from agents.comparison.spaces import Space, read_spaces
from agents.runs.arguments import find_configs
from agents.runs.command_line import prepared
from agents.runs.config import CONF
from agents.runs.sweeps import file_name
from agents.runs.tasks import full_name
from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError, LmGymError, check_int, unknown_name

KEYS = tuple(read_config(CONF / "compare.yaml"))
_BESIDE_A_FILE = ("protocol", "out", "workers")  # what may be said beside protocol=FILE
_PLURAL = {"agent": "agents", "task": "tasks", "seed": "seeds"}
_NOT_OURS = ("resume", "trust")  # keys of training that make no sense here
_MAX_NAME = 60  # characters of what a comparison is called, its digest not counted


@dataclass(frozen=True)
class Protocol:
    """What is compared.

    Attributes:
        agents, tasks: by name. seeds: of the reported runs; of the first group of them where more are added.
        max_seeds: how many there may be at most, where they are added; None adds none. margin: of "the same" then.
        overrides: `key=value`, of every run. varied: keys with the values that they have in turn.
        tune: what is tuned. trials: settings that are tried for each agent. tuning_seeds: runs of each setting.
        config_dir: another directory of configs, with agents of one's own.
    """

    agents: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    max_seeds: int | None = None
    margin: float | None = None
    overrides: tuple[str, ...] = ()
    varied: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tune: tuple[Space, ...] = ()
    trials: int = 16
    tuning_seeds: int = 1
    config_dir: str | None = None

    def as_values(self) -> dict[str, Any]:
        """Plain values, for a file."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values["varied"] = {key: list(several) for key, several in self.varied}
        values["tune"] = {space.key: space.text for space in self.tune}
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}

    @property
    def name(self) -> str:
        """What the comparison is called: the same for every number of seeds, so that more can be added.

        Where seeds are added by a rule, how many at a time is a part of the rule.
        """
        kept = replace(self, seeds=()) if self.max_seeds is None else self
        digest = hashlib.sha256(repr(kept).encode()).hexdigest()[:8]
        words = "-".join(["+".join(self.agents), "+".join(self.tasks)])
        return f"compare-{file_name(words)[:_MAX_NAME]}-{digest}"


@dataclass(frozen=True)
class Request:
    """A command that has been read.

    Attributes:
        protocol: what is compared. runs: directories of runs that exist, or globs of these.
        out: where all of it goes. workers: processes; None is one for every core.
        source: the file that the protocol comes from, with its SHA-256; None where it comes from the command line.
    """

    protocol: Protocol
    runs: tuple[str, ...]
    out: Path
    workers: int | None
    source: tuple[str, str] | None = None


def read_request(arguments: Sequence[str]) -> Request:
    """Reads the arguments of the command.

    Raises:
        LmGymError: naming the argument, with the nearest name where one is not known.
    """
    arguments, config_dir = _without_config_dir(arguments)
    seen: set[str] = set()
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            raise InvalidArgumentError(f"`{argument}` must be KEY=VALUE, such as agents=ppo,rloo or seeds=5.")
        key = argument.partition("=")[0].lstrip("+")
        if key in seen:
            raise InvalidArgumentError(f"`{key}` must be given once: {key}=VALUE,VALUE for several values.")
        seen.add(key)
    given = {}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in KEYS:
            given[key] = value
        else:
            overrides.append(argument)
    source = None
    if _text(given, "protocol"):
        beside = [argument for argument in arguments if argument.partition("=")[0] not in _BESIDE_A_FILE]
        if beside:
            raise InvalidArgumentError(
                f"`protocol` must be all that is asked for, got {shlex.join(beside)} beside it: write that in the file."
            )
        source, of_file = read_protocol(Path(given["protocol"]))
        own = {key: value for key, value in of_file.items() if key in KEYS}
        overrides = [f"{key}={value}" for key, value in of_file.items() if key not in KEYS]
        given = {**own, **given}
    protocol = _protocol(given, overrides, config_dir)
    runs = tuple(filter(None, (_text(given, "runs") or "").split(",")))
    if not protocol.agents and not runs:
        raise InvalidArgumentError("`agents` must be names of agents, such as agents=ppo,rloo tasks=echo-4, got none.")
    name = protocol.name if protocol.agents else f"compare-{hashlib.sha256(repr(runs).encode()).hexdigest()[:8]}"
    workers = _text(given, "workers")
    return Request(
        protocol,
        runs,
        Path(_text(given, "out") or f"runs/{name}"),
        None if workers is None else _count("workers", workers),
        source,
    )


def _protocol(given: Mapping[str, str], overrides: Sequence[str], config_dir: str | None) -> Protocol:
    defaults = read_config(CONF / "compare.yaml")
    fixed, varied = _split_overrides(overrides)
    agents = _split(_text(given, "agents"))
    tasks = _split(_text(given, "tasks"))
    if bool(agents) != bool(tasks):
        raise InvalidArgumentError("`agents` and `tasks` must be given together: agents=ppo,rloo tasks=echo-4,reviews.")
    known = find_configs("agent", [] if config_dir is None else ["--config-dir", config_dir])
    for agent in agents:
        if agent not in known:
            raise unknown_name("agents", agent, known)
    tune = _text(given, "tune")
    protocol = Protocol(
        agents,
        tuple(dict.fromkeys(_named_task(task) for task in tasks)),
        _read_seeds(given.get("seeds", str(defaults["seeds"]))),
        None if _text(given, "max_seeds") is None else _count("max_seeds", given["max_seeds"]),
        _read_margin(_text(given, "margin")),
        fixed,
        varied,
        () if tune is None else read_spaces(tune),
        _count("trials", given.get("trials", str(defaults["trials"]))),
        _count("tuning_seeds", given.get("tuning_seeds", str(defaults["tuning_seeds"]))),
        config_dir,
    )
    _check_rule(protocol, _text(given, "runs"))
    return protocol


def _read_margin(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        margin = float(text)
    except ValueError:
        margin = math.nan
    if not 0 < margin < math.inf:
        raise InvalidArgumentError(f"`margin` must be a share of the gain above 0, such as 0.02, got {text!r}.")
    return margin


def _check_rule(protocol: Protocol, runs: str | None) -> None:
    """Raises `InvalidArgumentError` where seeds are to be added and cannot be."""
    most = protocol.max_seeds
    if most is None:
        if protocol.margin is not None:
            raise InvalidArgumentError("`margin` must come with `max_seeds`, which adds seeds until pairs are decided.")
        return
    group = len(protocol.seeds)
    if protocol.seeds != tuple(range(group)) or group < 2:
        raise InvalidArgumentError("`seeds` must be a number of at least 2 with `max_seeds`: how many come at a time.")
    if most <= group or most % group:
        raise InvalidArgumentError(f"`max_seeds` must be a multiple of `seeds`={group} and above it, got {most}.")
    for name, given in (("tune", protocol.tune), ("runs", runs)):
        if given:
            raise InvalidArgumentError(
                f"`{name}` must not be given with `max_seeds`: its rule is about runs of its own."
            )


def _named_task(name: str) -> str:
    try:
        return full_name(name)
    except LmGymError as error:
        raise type(error)(str(error).replace("`task`", "`tasks`")) from None


def _split_overrides(
    overrides: Sequence[str],
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """Overrides of training that hold for every run, and those with several values."""
    fixed = []
    varied = []
    for override in prepared(["--multirun", *overrides])[1:]:
        key = override.partition("=")[0].lstrip("+")
        if key in _PLURAL:
            raise InvalidArgumentError(f"`{key}` is called `{_PLURAL[key]}` here: {_PLURAL[key]}=...")
        if key in _NOT_OURS:
            raise InvalidArgumentError(f"`{key}` must not be given here: the same command goes on with what is there.")
        first = re.split(r"[./@]", key)[0]
        if first in KEYS:
            raise InvalidArgumentError(f"`{first}` must be a value or several, and has no parts: got {override}.")
        if first == "hydra":
            raise InvalidArgumentError(f"`{key}` must not be given here: the runs go to processes of this command.")
        if first not in _keys_of_training() and not override.startswith(("+", "~")):
            raise unknown_name(first, first, {*KEYS, *_keys_of_training()} - set(_PLURAL) - set(_NOT_OURS))
        try:
            meant = OverridesParser.create().parse_overrides([override])[0]
        except HydraException as error:
            raise InvalidArgumentError(f"`{override}` cannot be read: {error}") from error
        if meant.is_sweep_override():
            varied.append((override.partition("=")[0], tuple(map(str, meant.sweep_string_iterator()))))
        else:
            fixed.append(override)
    return tuple(fixed), tuple(varied)


@functools.cache
def _keys_of_training() -> frozenset[str]:
    """Keys of `conf/train.yaml`, and groups of files of configs."""
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    return frozenset((groups | set(read_config(CONF / "train.yaml"))) - {"defaults", "hydra"})


def _read_seeds(text: str) -> tuple[int, ...]:
    """`5` is the first five, `10,11` these two."""
    if "," not in text:
        return tuple(range(_count("seeds", text)))
    numbers = _split(text)
    if not all(number.isdecimal() for number in numbers):
        raise InvalidArgumentError(f"`seeds` must be a number of seeds, or seeds such as 10,11,12, got {text!r}.")
    return tuple(dict.fromkeys(map(int, numbers)))


def _count(name: str, text: str) -> int:
    number = int(text) if re.fullmatch(r"\d{1,9}", text) else text
    check_int(name, number, 1)
    return int(number)


def _text(given: Mapping[str, str], key: str) -> str | None:
    value = given.get(key)
    return None if value in (None, "", "null") else value


def _split(text: str | None) -> tuple[str, ...]:
    """The parts between commas, those in brackets too: `[a,b]` is `a,b`."""
    if text is None:
        return ()
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return tuple(dict.fromkeys(part.strip() for part in inside.split(",") if part.strip()))


def _without_config_dir(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without `--config-dir DIRECTORY`, and the directory."""
    kept = list(arguments)
    for option in ("--config-dir", "-cd"):
        if option in kept and kept.index(option) + 1 < len(kept):
            i = kept.index(option)
            return [*kept[:i], *kept[i + 2 :]], _directory(kept[i + 1])
        for argument in kept:
            if argument.startswith(f"{option}="):
                kept.remove(argument)
                return kept, _directory(argument.partition("=")[2])
    return kept, None


def _directory(path: str) -> str:
    if not Path(path).is_dir():
        raise InvalidArgumentError(f"`--config-dir` must be a directory, got {path!r}.")
    return str(Path(path).resolve())
