"""Stable-Baselines3 on the token MDP: `VecEnvBridge`, `PolicyKLCallback`, and `evaluate` on the scale of V*.

Needs the extra `sb3`: pip install 'lmgym[sb3]'.
"""

try:
    import stable_baselines3  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("lmgym.sb3 needs Stable-Baselines3: pip install 'lmgym[sb3]'", name=error.name) from error

from lmgym.sb3.bridge import VecEnvBridge
from lmgym.sb3.callback import PolicyKLCallback
from lmgym.sb3.grading import Grade, evaluate

__all__ = ["Grade", "PolicyKLCallback", "VecEnvBridge", "evaluate"]
