"""Tasks: one file each, found by name."""

from lmgym.tasks.base import StoredOptimum, Task, make_task, register_task, registered_tasks, suite

__all__ = ["StoredOptimum", "Task", "make_task", "register_task", "registered_tasks", "suite"]
