"""RLHF as a classic RL problem: text generation as a Gymnasium environment.

Importing this registers the environments and makes forks safe (`lmgym.forking`); torch and transformers load with the
first env.
"""

from collections.abc import Callable

from gymnasium.envs.registration import register

from lmgym.forking import let_forks_use_one_thread
from lmgym.tasks import base as _tasks
from lmgym.tasks.base import StoredOptimum, Task, suite

__version__ = "0.1.0"
__all__ = ["register_task", "suite"]

_TOKEN = {
    "entry_point": "lmgym.wrappers.inside:make_token_env",
    "vector_entry_point": "lmgym.wrappers.inside:make_token_vector_env",
}
_BANDIT = {
    "entry_point": "lmgym.wrappers.inside:make_bandit_env",
    "vector_entry_point": "lmgym.wrappers.inside:make_bandit_vector_env",
}


def register_task(name: str, build: Callable[[], Task], *, version: int = 0) -> str:
    """Makes a task known: to `task=name`, to `suite()`, and to `gym.make` by an id of its own.

    `lmgym.testing.check_task(name)` gives it the tests that the built-in tasks get.

    Args:
        name: lower-case words joined by "_"; the settings of one task are told apart by what follows a "-".
        build: makes the task; it runs whenever the task is asked for, not now.
        version: of the task. A change of anything that moves its optimum is a new version.

    Returns:
        The Gymnasium id, such as "lmgym/Keyword-8-v0".

    Raises:
        InvalidArgumentError: for a name that cannot be.
    """
    return _register(_tasks.register_task(name, build, version=version))


def _register(task: _tasks.Registered) -> str:
    register(id=task.env_id, kwargs={"task": task.name}, **_TOKEN)  # type: ignore[arg-type]
    return task.env_id


let_forks_use_one_thread()


def _find_optimum(task: Task, split: str) -> StoredOptimum:
    from lmgym.optimum import find_optimum  # torch loads here

    return find_optimum(task, split)


_tasks.solve_with(_find_optimum)
register(id="lmgym/RLHF-v0", **_TOKEN)  # type: ignore[arg-type]
register(id="lmgym/RLHFBandit-v0", **_BANDIT)  # type: ignore[arg-type]
register(id="lmgym/RLHFText-v0", entry_point="lmgym.wrappers.inside:make_text_env")
for _task in _tasks.registered_tasks().values():
    _register(_task)
