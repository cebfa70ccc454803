"""Tasks: one file each, found by name."""

from lmgym.tasks.base import Task
from lmgym.tasks.registry import make_task, register_task, registered_tasks, suite
from lmgym.tasks.stored import StoredOptimum

__all__ = ["StoredOptimum", "Task", "make_task", "register_task", "registered_tasks", "suite"]
