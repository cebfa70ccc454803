"""The same problem as a one-step bandit: an action is a whole response."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from lmgym.envs.engine import Transition
from lmgym.envs.token import RESET_OPTIONS, RLHFEnv, as_actions
from lmgym.envs.vector import RLHFVectorEnv

_OPTIONS = tuple(name for name in RESET_OPTIONS if name != "response_ids")


class RLHFBanditEnv(RLHFEnv):
    """A contextual bandit over responses (`lmgym/RLHFBandit-v0`).

    The action is `MultiDiscrete([V] * T)`, read up to the first token that ends a response. The reward is the
    discounted return that the token MDP would have paid for it (at gamma = 1, the return), from one teacher-forced
    pass. Observations, arguments and info are those of `RLHFEnv`, `ref_log_prob` being the whole response's; so are the
    reset options but `response_ids`.
    """

    reset_options = _OPTIONS

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        engine = self._engine
        self.action_space = spaces.MultiDiscrete(np.full(engine.horizon, engine.lm.vocab_size))

    def _advance(self, action: Any) -> Transition:
        return self._engine.step_whole(as_actions(action, (self._engine.horizon,))[None], self._engine.running.copy())


class RLHFBanditVectorEnv(RLHFVectorEnv):
    """`RLHFBanditEnv` N times over: one teacher-forced pass and one call of the reward a step.

    Arguments as for `RLHFVectorEnv`. Every step ends every episode, so "NextStep" autoreset spends every other step on
    resetting; "SameStep" and "Disabled" do not.
    """

    reset_options = _OPTIONS

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        engine = self._engine
        self.single_action_space = spaces.MultiDiscrete(np.full(engine.horizon, engine.lm.vocab_size))
        self.action_space = batch_space(self.single_action_space, num_envs)

    def _advance(self, actions: Any, live: npt.NDArray[np.bool_]) -> Transition:
        return self._engine.step_whole(as_actions(actions, (self.num_envs, self._engine.horizon)), live)
