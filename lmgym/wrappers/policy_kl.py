"""The policy's half of the KL, for agents that know the log-prob of what they sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from lmgym.envs.token_ids import to_array
from lmgym.errors import InvalidActionError
from lmgym.wrappers.vector import TokenVectorWrapper

_LOG_PROB = spaces.Box(-np.inf, 0.0, (), np.float64)


class PolicyKL(gym.Wrapper[Any, Any, Any, int], RecordConstructorArgs):
    """Takes `Dict(token, log_prob)` and subtracts `kl_coef * log_prob`: the reward is then the whole r_t of the design.

    `log_prob` is log pi(token | s) in nats, of the distribution that sampled the token. With `dense_kl=False` the sum
    over the whole episode is subtracted from its last reward, where the env adds the other half. The env's `info` is
    passed through; `discounted_return` in it is without this half.
    """

    def __init__(self, env: gym.Env[Any, int]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.action_space = spaces.Dict(token=env.action_space, log_prob=_LOG_PROB)
        self._owed = 0.0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Resets the env, and what is owed to 0."""
        self._owed = 0.0
        return self.env.reset(**kwargs)

    def step(self, action: dict[str, Any]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps with the token, and subtracts the price of its log-prob."""
        owed = self._owed + float(self.env.get_wrapper_attr("kl_coef") * _log_probs(action, ()))
        observation, reward, terminated, truncated, info = self.env.step(action["token"])
        is_due = terminated or truncated or self.env.get_wrapper_attr("dense_kl")
        self._owed = 0.0 if is_due else owed
        return observation, float(reward) - owed * is_due, terminated, truncated, info


class VectorPolicyKL(TokenVectorWrapper):
    """`PolicyKL` for vector envs: `Dict(token (N,), log_prob (N,))`. A row that is being reset owes nothing."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.single_action_space = spaces.Dict(token=env.single_action_space, log_prob=_LOG_PROB)
        self.action_space = batch_space(self.single_action_space, env.num_envs)
        self._kl_coef = env.unwrapped.get_attr("kl_coef")[0]  # type: ignore[attr-defined]
        self._dense = env.unwrapped.get_attr("dense_kl")[0]  # type: ignore[attr-defined]
        self._owed = np.zeros(env.num_envs)
        self._resetting = np.zeros(env.num_envs, dtype=np.bool_)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Resets the rows, or those of `options["reset_mask"]`."""
        result = self.env.reset(**kwargs)
        rows = self._rows(kwargs.get("options"))
        self._resetting[rows] = False
        self._owed[rows] = 0.0
        return result

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps with the tokens, and subtracts the price of their log-probs."""
        owed = self._owed + self._kl_coef * _log_probs(actions, (self.num_envs,)) * ~self._resetting
        observations, rewards, terminated, truncated, infos = self.env.step(actions["token"])
        ended = terminated | truncated
        if self.env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP:
            self._resetting = ended
        is_due = ended | self._dense
        self._owed = np.where(is_due, 0.0, owed)
        return observations, rewards - owed * is_due, terminated, truncated, infos


def _log_probs(action: dict[str, Any], shape: tuple[int, ...]) -> Any:
    if not isinstance(action, Mapping) or not {"token", "log_prob"} <= action.keys():
        raise InvalidActionError(f"`action` must be a dict of token and log_prob, got {action!r}.")
    given = to_array(action["log_prob"])
    known = given is not None and given.shape == shape and np.issubdtype(given.dtype, np.number)
    log_probs = np.asarray(given if known else np.nan, dtype=np.float64)
    if np.isnan(log_probs).any() or not (log_probs <= 1e-6).all():
        raise InvalidActionError(
            f"`log_prob` must be log-probs (<= 0, nats) of shape {shape}, got {action['log_prob']!r}."
        )
    return log_probs
