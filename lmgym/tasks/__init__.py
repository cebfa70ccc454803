"""Tasks: one file each, found by name."""

from lmgym.tasks.base import Task, make_task, register_task, registered_tasks

__all__ = ["Task", "make_task", "register_task", "registered_tasks"]
