"""RLHF as a classic RL problem: text generation as a Gymnasium environment.

Importing this registers the environments and makes forks safe (`lmgym.forking`). The names below load the modules that
define them when they are first used, so that torch and transformers load with the first environment.
"""

import importlib
from typing import TYPE_CHECKING

from gymnasium.envs.registration import register

from lmgym.forking import let_forks_use_one_thread
from lmgym.tasks import StoredOptimum, Task, make_task, register_task, suite
from lmgym.tasks import base as _tasks
from lmgym.tasks import registry as _registry

if TYPE_CHECKING:
    from lmgym.episodes import Episodes
    from lmgym.evaluation import evaluate
    from lmgym.models.policy import CausalPolicy
    from lmgym.models.sampling import Sampler
    from lmgym.optimum.solve import solve
    from lmgym.rollout import collect

__version__ = "0.1.0"
__all__ = [
    "CausalPolicy",
    "Episodes",
    "Sampler",
    "StoredOptimum",
    "Task",
    "collect",
    "evaluate",
    "make_task",
    "register_task",
    "solve",
    "suite",
]

# The public names whose modules import torch, with the module of each.
_LAZY = {
    "CausalPolicy": "lmgym.models.policy",
    "Episodes": "lmgym.episodes",
    "Sampler": "lmgym.models.sampling",
    "collect": "lmgym.rollout",
    "evaluate": "lmgym.evaluation",
    "solve": "lmgym.optimum.solve",
}


if not TYPE_CHECKING:  # a type checker reads the imports above, and then finds a name that is misspelt

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # what is public, without the names that this file imports


def _find_optimum(task: Task, split: str) -> StoredOptimum:
    from lmgym.optimum import find_optimum  # torch loads here

    return find_optimum(task, split)


let_forks_use_one_thread()
_tasks.solve_with(_find_optimum)
register(id="lmgym/RLHF-v0", **_registry.TOKEN_ENTRY_POINTS)  # type: ignore[arg-type]
register(
    id="lmgym/RLHFBandit-v0",
    entry_point="lmgym.wrappers.inside:make_bandit_env",
    vector_entry_point="lmgym.wrappers.inside:make_bandit_vector_env",
)
register(id="lmgym/RLHFText-v0", entry_point="lmgym.wrappers.inside:make_text_env")
_registry.registered_tasks()  # which registers an id for each
