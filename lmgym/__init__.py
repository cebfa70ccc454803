"""RLHF as a classic RL problem: text generation as a Gymnasium environment.

Importing this registers the environments and does nothing else; torch and transformers load with the first env.
"""

from gymnasium.envs.registration import register

from lmgym.tasks.base import registered_tasks

__version__ = "0.1.0"


def _register() -> None:
    envs = "lmgym.envs"
    token = {"entry_point": f"{envs}.token:RLHFEnv", "vector_entry_point": f"{envs}.vector:RLHFVectorEnv"}
    register(id="lmgym/RLHF-v0", **token)  # type: ignore[arg-type]
    bandit = {"entry_point": f"{envs}.bandit:RLHFBanditEnv", "vector_entry_point": f"{envs}.bandit:RLHFBanditVectorEnv"}
    register(id="lmgym/RLHFBandit-v0", **bandit)  # type: ignore[arg-type]
    for task in registered_tasks().values():
        register(id=task.env_id, kwargs={"task": task.name}, **token)  # type: ignore[arg-type]


_register()
