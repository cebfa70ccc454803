"""The same problem as a one-step bandit: an action is a whole response."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from lmgym.envs.options import RESET_OPTIONS
from lmgym.envs.outcomes import Transition
from lmgym.envs.settings import Settings
from lmgym.envs.single import RLHFEnv
from lmgym.envs.token_ids import as_actions, refuse_text
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError

_OPTIONS = tuple(name for name in RESET_OPTIONS if name != "response_ids")


class RLHFBanditEnv(RLHFEnv):
    """A contextual bandit over responses (`lmgym/RLHFBandit-v0`).

    The action is `MultiDiscrete([V] * T)`, of which the tokens up to the end of the response count. The reward is the
    return that the token MDP would have given for it, from one teacher-forced pass. Observations, arguments and info
    are those of `RLHFEnv`, with `ref_log_prob` of the whole response; so are the reset options but `response_ids`.

    `gamma` must be 1 where the KL has a price. Below 1 every token's log-prob has a discount of its own, and an action
    has only their sum. At `kl_coef=0` the reward is the discounted score.

    Raises:
        InvalidArgumentError: for a discount below 1 and `kl_coef` above 0, before anything loads.
    """

    reset_options = _OPTIONS

    def __init__(self, **kwargs: Any) -> None:
        _check_discount(Settings.of(kwargs, type(self).__name__))
        super().__init__(**kwargs)
        engine = self._engine
        self.action_space = spaces.MultiDiscrete(np.full(engine.horizon, engine.lm.vocab_size))

    def _advance(self, action: Any) -> Transition:
        refuse_text(self._engine.lm, action)
        return self._engine.step_whole(as_actions(action, (self._engine.horizon,))[None], self._engine.running.copy())


class RLHFBanditVectorEnv(RLHFVectorEnv):
    """`RLHFBanditEnv` N times over: one teacher-forced pass and one call of the reward a step.

    Arguments as for `RLHFVectorEnv`. Every step ends every episode, so "NextStep" autoreset spends every other step on
    resetting; "SameStep" and "Disabled" do not.
    """

    reset_options = _OPTIONS

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        shared = {name: x for name, x in kwargs.items() if name not in ("autoreset_mode", "group_size")}
        _check_discount(Settings.of(shared, type(self).__name__))
        super().__init__(num_envs, **kwargs)
        engine = self._engine
        self.single_action_space = spaces.MultiDiscrete(np.full(engine.horizon, engine.lm.vocab_size))
        self.action_space = batch_space(self.single_action_space, num_envs)

    def _advance(self, actions: Any, live: npt.NDArray[np.bool_]) -> Transition:
        refuse_text(self._engine.lm, actions)
        return self._engine.step_whole(as_actions(actions, (self.num_envs, self._engine.horizon)), live)


def _check_discount(settings: Settings) -> None:
    task = settings.resolve()
    if task.kl_coef > 0 and task.gamma != 1:
        raise InvalidArgumentError(
            f"`gamma` must be 1 for the bandit at `kl_coef` > 0, got {task.gamma!r}: an action has one log-prob, that "
            "of the whole response, and a discount needs each token's. Take lmgym/RLHF-v0, which steps token by token."
        )
