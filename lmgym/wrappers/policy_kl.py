"""The policy's half of the KL, for agents that know the log-prob of what they sampled."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from lmgym.errors import InvalidActionError

_LOG_PROB = spaces.Box(-np.inf, 0.0, (), np.float64)


class PolicyKL(gym.Wrapper[Any, Any, Any, int]):
    """Takes `Dict(token, log_prob)` and subtracts `kl_coef * log_prob`: the reward is then the whole r_t of the design.

    `log_prob` is log pi(token | s) in nats of the law that sampled the token. The env's `info` is passed through;
    `discounted_return` in it is without this half.
    """

    def __init__(self, env: gym.Env[Any, int]) -> None:
        super().__init__(env)
        self.action_space = spaces.Dict(token=env.action_space, log_prob=_LOG_PROB)

    def step(self, action: dict[str, Any]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps with the token, and pays for its log-prob."""
        cost = self.env.get_wrapper_attr("kl_coef") * _log_probs(action, ())
        observation, reward, terminated, truncated, info = self.env.step(action["token"])
        return observation, float(reward) - float(cost), terminated, truncated, info


class VectorPolicyKL(VectorWrapper[Any, Any, Any, Any, Any]):
    """`PolicyKL` for vector envs: `Dict(token (N,), log_prob (N,))`. A row that is being reset pays nothing."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.single_action_space = spaces.Dict(token=env.single_action_space, log_prob=_LOG_PROB)
        self.action_space = batch_space(self.single_action_space, env.num_envs)
        self._kl_coef = env.unwrapped.get_attr("kl_coef")[0]  # type: ignore[attr-defined]
        self._resetting = np.zeros(env.num_envs, dtype=np.bool_)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Resets the rows, or those of `options["reset_mask"]`."""
        mask = (kwargs.get("options") or {}).get("reset_mask")
        result = self.env.reset(**kwargs)
        self._resetting[slice(None) if mask is None else mask] = False
        return result

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps with the tokens, and pays for their log-probs."""
        cost = self._kl_coef * _log_probs(actions, (self.num_envs,)) * ~self._resetting
        observations, rewards, terminated, truncated, infos = self.env.step(actions["token"])
        if self.env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP:
            self._resetting = terminated | truncated
        return observations, rewards - cost, terminated, truncated, infos


def _log_probs(action: dict[str, Any], shape: tuple[int, ...]) -> Any:
    log_probs = np.asarray(action["log_prob"], dtype=np.float64)
    if log_probs.shape != shape or not (log_probs <= 1e-6).all() or np.isnan(log_probs).any():
        raise InvalidActionError(
            f"`log_prob` must be log-probs (<= 0, nats) of shape {shape}, got {action['log_prob']!r}."
        )
    return log_probs
