"""What runs are called: their agents as on a command line, their labels by what was varied, and their problems."""

from __future__ import annotations

import functools
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from agents.runs.config import CONF
from agents.runs.trust import read_config

# Keys of a config that leave problem and result alone, or are of the problem.
_NOT_VARIED = (
    "_target_",
    "seed",
    "seeds",
    "device",
    "resume",
    "trust",
    "checkpoint_every",
    "task",
    "env",
    "evaluation",
)
_HOW_PROMPTS_COME = ("split", "prompt_order", "dtype", "max_prompt_tokens", "on_long", "task")

Config = Mapping[str, Any]


def agent_name(config: Config) -> str:
    """`ppo` of a config that `agent=ppo` composes; the import path of a class that is in no file of conf/agent."""
    agent = config["agent"]
    target = str(agent.get("_target_", "?"))
    module, _, class_name = target.rpartition(".")
    if not module.startswith("agents"):
        return target
    same = {
        name: choice
        for name, choice in _choices().items()
        if choice["_target_"].rpartition(".")[2] == class_name and choice.get("algorithm") == agent.get("algorithm")
    }
    if same:  # of several names for one class, the one whose values these are
        return min(same, key=lambda name: _apart(same[name], agent))
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).lower()


def _apart(choice: Mapping[str, Any], agent: Mapping[str, Any]) -> tuple[int, int]:
    """How many values of a file of conf/agent a config has otherwise, and minus how many it has as they are there."""
    own = [key for key in choice if key != "_target_"]
    equal = sum(agent.get(key) == choice[key] for key in own)
    return len(own) - equal, -equal


@functools.cache
def _choices() -> dict[str, dict[str, Any]]:
    return {path.stem: read_config(path) for path in sorted((CONF / "agent").glob("*.yaml"))}


def own_task(config: Config) -> str | None:
    """The registered task of which a run is graded exactly as it is, or None where something of it was changed."""
    return str(_task(config)) if not _changes(config) else None


def problem_name(config: Config) -> str:
    """The task with what was changed of it: `reviews kl_coef=0.05`."""
    return " ".join([str(_task(config)), *_changes(config)])


def _task(config: Config) -> Any:
    task = config.get("task")
    return task.get("task") if isinstance(task, Mapping) else task  # which once held what is now in `env`


def _changes(config: Config) -> list[str]:
    env = config["task"] if isinstance(config.get("task"), Mapping) else config.get("env") or {}
    changed = [
        f"{name}={_short(value)}" for name, value in env.items() if name not in _HOW_PROMPTS_COME and value is not None
    ]
    evaluation = config.get("evaluation") or {}
    if evaluation.get("split", "test") != "test":
        changed.append(f"split={evaluation['split']}")
    if evaluation.get("prompts") is not None:
        changed.append(f"prompts={evaluation['prompts']}")
    return changed


def find_labels(configs: Sequence[Config]) -> list[str]:
    """The name of each run's agent, with the values of what differs between runs of that agent on one task.

    A key that a config does not have is one that is younger than its run, and is not said of it.
    """
    agents = [agent_name(config) for config in configs]
    settings = [_settings(config) for config in configs]
    labels = list(agents)
    for agent in set(agents):
        rows = [i for i, name in enumerate(agents) if name == agent]
        by_task: dict[str, list[int]] = defaultdict(list)
        for i in rows:
            by_task[problem_name(configs[i])].append(i)
        varied = [
            key
            for key in dict.fromkeys(key for i in rows for key in settings[i])
            if any(
                len({repr(settings[i][key]) for i in several if key in settings[i]}) > 1 for several in by_task.values()
            )
        ]
        for i in rows:
            values = [f"{_last(key, varied)}={_short(settings[i][key])}" for key in varied if key in settings[i]]
            labels[i] = " ".join([agent, *values])
    return labels


def _settings(config: Config) -> dict[str, Any]:
    """What may be varied, by dotted key."""
    return dict(_leaves({key: value for key, value in config.items() if key not in _NOT_VARIED}))


def _leaves(values: Config, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if name == "_target_":
            continue
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found


def _last(key: str, keys: Sequence[str]) -> str:
    """`lr` of `agent.lr`, unless another key ends so."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _short(value: Any) -> str:
    """`1e-3`, `true`, and the last two parts of a path."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        exponential = re.sub(r"\.?0*e([+-])0*(\d)", lambda match: f"e{match[1].strip('+')}{match[2]}", f"{value:.6e}")
        return exponential if 0 < abs(value) < 0.01 or abs(value) >= 1e6 else f"{value:g}"
    if isinstance(value, list | tuple):
        return f"({len(value)} given)"
    return "/".join(str(value).split(os.sep)[-2:])
