"""A whole response as a string, for agents whose actions are texts.

Shapes: T response columns.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from lmgym.envs.base import engine_of
from lmgym.envs.engine import Engine
from lmgym.envs.single import check_running
from lmgym.errors import InvalidActionError, InvalidArgumentError
from lmgym.wrappers.text_observation import text_space


class TextActions(gym.Wrapper[Any, str, Any, Any], RecordConstructorArgs):
    """`Text`: the action is the response, as text that follows the prompt, for the bandit of whole responses.

    It becomes the tokens that the reference's tokenizer makes of it after the prompt, and an EOS where there is room.
    Tokens beyond T are cut off, as in a response that is generated; `info["finish_reason"]` is then "length".
    The reward is that of the tokens: the score, and `kl_coef * log pi_ref` of the response.

    Args:
        env: `lmgym/RLHFBandit-v0`.

    Raises:
        InvalidArgumentError: for another env.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        engine = engine_of(env)
        if not isinstance(env.action_space, spaces.MultiDiscrete):
            raise InvalidArgumentError(f"`env` must take whole responses, got one with the actions {env.action_space}.")
        self.action_space = text_space(engine)

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Takes a response.

        Raises:
            InvalidActionError: for what is no string, or no text that tokens after the prompt's can have.
        """
        engine = engine_of(self.env)
        check_running(engine.running[0])
        return self.env.step(_response_ids(engine, action))


def _response_ids(engine: Engine, text: Any) -> Any:
    """(T,) ids of a response; those after its end do not matter."""
    if not isinstance(text, str):
        raise InvalidActionError(f"`action` must be a text, got {text!r}.")
    prompt = engine.current[0]
    assert prompt is not None
    try:
        ids = engine.lm.encode_response(prompt.text, prompt.ids, text)
    except InvalidArgumentError as error:
        raise InvalidActionError(
            f"`action` must be a text that can follow the prompt, got {text!r}: {error}"
        ) from error
    ids = (ids + sorted(engine.lm.eos_token_ids)[:1])[: engine.horizon]
    padding = [engine.lm.pad_token_id] * (engine.horizon - len(ids))
    return np.array(ids + padding, dtype=np.int64)
