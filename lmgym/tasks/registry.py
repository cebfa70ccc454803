"""The tasks that have a name. Every module of `lmgym.tasks` registers its own; whoever has another adds it here."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

from gymnasium.envs.registration import register

from lmgym.data.deferred import DeferredPrompts
from lmgym.data.prompts import PromptText, read_prompts
from lmgym.errors import InvalidArgumentError, check_bool, check_int, unknown_name
from lmgym.rewards.base import is_import_path
from lmgym.rewards.members import is_ensemble
from lmgym.rewards.reading import ModelReward
from lmgym.tasks.base import Task, describe_prompts, load_tokenizer_of
from lmgym.tasks.stored import stored_optima

TOKEN_ENTRY_POINTS = {  # what Gymnasium makes the token MDP of a task with
    "entry_point": "lmgym.wrappers.inside:make_token_env",
    "vector_entry_point": "lmgym.wrappers.inside:make_token_vector_env",
}
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*(-[\w.-]+)?")
# Fields that V* does not depend on.
_NEUTRAL = {"name", "gold", "truncate", "max_prompt_tokens", "on_long", "optima"}


@dataclass(frozen=True)
class Registered:
    """A task with a name: its version, the function that builds it, and whether its parts are on the hub."""

    name: str
    version: int
    build: Callable[[], Task]
    on_hub: bool = False

    @cached_property
    def env_id(self) -> str:
        """The Gymnasium id: `lmgym/Name-v0`, or `lmgym/Name-setting-v0` for a task of several settings."""
        return f"lmgym/{''.join(part.capitalize() for part in self.name.split('_'))}-v{self.version}"

    @property
    def description(self) -> str:
        """The docstring of the module that builds the task."""
        build = self.build.func if isinstance(self.build, partial) else self.build
        return (sys.modules[build.__module__].__doc__ or "").strip()

    def task(self) -> Task:
        """Builds the task, with its stored optimum."""
        task = self.build()
        return task if task.optima else replace(task, optima=stored_optima(self.name, self.version))


_registry: dict[str, Registered] = {}


def register_task(name: str, build: Callable[[], Task], *, version: int = 0, on_hub: bool = False) -> str:
    """Makes a task known to `task=name`, to `suite()`, and to `gym.make` under an id of its own.

    Names and versions are permanent. Whatever moves the optimum makes a new version: a change of the reference, the
    reward, the prompts or the ends of episodes. `lmgym.testing.check_task(name)` runs the tests of the built-in tasks.

    Args:
        name: lower-case words joined by "_". What follows a "-" tells the settings of one task apart.
        build: makes the task. It runs whenever the task is needed, not now.
        version: of the task.
        on_hub: whether its model or its prompts have to be downloaded, so that nobody loads them unasked, and its
            optimum is not looked for.

    Returns:
        The Gymnasium id, such as "lmgym/Keyword-8-v0".

    Raises:
        InvalidArgumentError: for a name that cannot be.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgumentError(f"`name` must be like 'keyword' or 'keyword-8', got {name!r}.")
    check_int("version", version, 0)
    check_bool("on_hub", on_hub)
    registered = Registered(name, version, build, on_hub)
    _registry[name] = registered
    register(id=registered.env_id, kwargs={"task": name}, **TOKEN_ENTRY_POINTS)  # type: ignore[arg-type]
    return registered.env_id


def registered_tasks() -> dict[str, Registered]:
    """The registered tasks by name, the settings of one task together. Imports every module of this package first."""
    package = sys.modules[__package__]
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_registry.items(), key=lambda item: item[0].partition("-")[0]))


class Suite(list[Task]):
    """Tasks, which print as a table."""

    def __repr__(self) -> str:
        rows = [("task", "T", "prompts", "kl_coef", "gamma", "J_ref", "V* (test)"), *map(_cells, self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _cells(task: Task) -> tuple[str, ...]:
    known = task.optima.get("test")
    if isinstance(task.prompts, DeferredPrompts):
        prompts = describe_prompts(task.prompts)
        unknown = "not known"
    else:
        prompts = " + ".join(f"{len(texts):,}" for texts in dict.fromkeys(map(tuple, task.prompts.values())))
        unknown = "task.optimum()"
    optimum = ("", unknown) if known is None else (f"{known.reference:.4f}", known.describe())
    return (task.name, str(task.max_new_tokens), prompts, f"{task.kl_coef:g}", f"{task.gamma:g}", *optimum)


def suite() -> Suite:
    """Every registered task with its stored optimum; it prints as a table. Loads no model, and not even torch."""
    return Suite(registered.task() for registered in registered_tasks().values())


def make_task(task: str | Task, **changes: Any) -> Task:
    """A registered task, or a given one, with some of its fields replaced.

    Args:
        task: a registered name, or a Task.
        changes: fields of Task; None leaves a field as it is. A new `reward` drops `gold`, which the old reward
            approximated; a reward model is read as the task reads its own (`ModelReward`). `prompts` may also be a list
            or a file (`read_prompts`), which becomes every split; and of a task on a data set of the hub, a directory
            of the same layout. A change that moves the optimum drops the stored one.

    Raises:
        UnknownNameError: if no task has that name.
        InvalidArgumentError: if a field has a value it cannot have.
    """
    if isinstance(task, str):
        known = registered_tasks()
        if task not in known:
            raise unknown_name("task", task, known, listed_by="`lmgym.suite()`")
        task = known[task].task()
    elif not isinstance(task, Task):
        raise InvalidArgumentError(f"`task` must be a name or a lmgym.tasks.Task, got {task!r}.")
    changes = {name: value for name, value in changes.items() if value is not None}
    if {"model", "prompts"} & set(changes):
        changes["prompts"] = _read_prompts(task, changes.get("prompts"), changes.get("model", task.model))
    if "reward" in changes:
        changes["reward"] = _read_alike(task.reward, changes["reward"])
        changes.setdefault("gold", None)  # another reward approximates another one
        if not _are_read_alike(task.reward, changes["reward"]):
            changes.setdefault("reward_weights", None)
    if {"model", "prompts"} & set(changes) and task.on_long == "error":
        changes.setdefault("max_prompt_tokens", None)  # the task's own limit was counted in its own tokens
    changed = replace(task, **changes)
    moved = any(getattr(changed, name) != getattr(task, name) for name in changes if name not in _NEUTRAL)
    return replace(changed, optima={}) if moved and "optima" not in changes else changed


def _read_prompts(task: Task, prompts: Any, model: Any) -> Mapping[str, Sequence[Any]]:
    """The prompts in place of a task's own. None stands for its own, whose conversations another model reads anew."""
    own = task.prompts
    if isinstance(own, DeferredPrompts) and (prompts is None or _may_be_directory(prompts)):
        return own if prompts is None else own.at(prompts)
    if prompts is None:
        return {split: _as_read(texts) for split, texts in own.items()}
    if isinstance(prompts, Mapping):
        return prompts
    texts = read_prompts(prompts, tokenizer=cache(lambda: load_tokenizer_of(model)))
    return dict.fromkeys(own, texts)


def _as_read(prompts: Sequence[str]) -> Sequence[Any]:
    """The prompts as they were before they became texts: conversations are conversations again."""
    if any(isinstance(prompt, PromptText) and prompt.messages is not None for prompt in prompts):
        return [prompt.row() if isinstance(prompt, PromptText) else prompt for prompt in prompts]
    return prompts


def _may_be_directory(prompts: object) -> bool:
    """Whether prompts are given as a path that is not one of a file."""
    return isinstance(prompts, (str, os.PathLike)) and not os.path.isfile(prompts)


def _read_alike(own: Any, reward: Any) -> Any:
    """A reward in place of a task's own: names of models in place of a `ModelReward` are read as that reads its own."""
    if isinstance(reward, (list, tuple)) and isinstance(own, tuple) and len(reward) == len(own):
        return [_read_alike(*pair) for pair in zip(own, reward, strict=True)]
    first = own[0] if isinstance(own, tuple) else own
    is_model = isinstance(reward, (str, os.PathLike)) and not is_import_path(reward) and not is_ensemble(reward)
    if isinstance(first, ModelReward) and is_model:
        return first.of_model(os.fspath(reward))
    return reward


def _are_read_alike(own: Any, reward: Any) -> bool:
    """Whether every part of a list of rewards is another model in place of one of the task's, read as that one."""
    both = isinstance(own, tuple) and isinstance(reward, list) and len(own) == len(reward)
    return both and all(isinstance(part, ModelReward) for part in (*own, *reward))
