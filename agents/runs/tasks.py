"""The names of tasks on a command line: `task=keyword-32`, or `task=keyword` for the usual setting of a family."""

from __future__ import annotations

from collections.abc import Mapping

from agents.runs.config import told_new_name
from lmgym.errors import InvalidArgumentError, unknown_name
from lmgym.tasks import registered_tasks

# The setting that the name of a family stands for. A family without an entry has to be given with its setting.
USUAL_SETTINGS = {
    "anchor": "anchor-0.1",
    "arithmetic": "arithmetic-1",
    "brackets": "brackets-2",
    "discount": "discount-0.95",
    "echo": "echo-4",
    "keyword": "keyword-8",
    "noise": "noise-1",
    "proxy": "proxy-200",
    "rare": "rare-3",
    "stop": "stop-8",
    "vocabulary": "vocabulary-512",
}


def full_name(task: object) -> str:
    """The registered name of a task that a command line names.

    Args:
        task: a registered name, or that of a family.

    Raises:
        UnknownNameError: for any other name, with the nearest one.
        InvalidArgumentError: for names with values, which `env` takes.
    """
    if isinstance(task, Mapping):
        raise InvalidArgumentError("\n".join(told_new_name(f"task.{key}") for key in task))
    known = registered_tasks()
    name = USUAL_SETTINGS.get(task, task) if isinstance(task, str) else task
    if not isinstance(name, str) or name not in known:
        raise unknown_name("task", task, known, listed_by="`lmgym.suite()`")
    return name
