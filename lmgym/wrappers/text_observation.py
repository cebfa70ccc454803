"""The text so far as the observation."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from lmgym.envs.base import engine_of
from lmgym.envs.engine import Engine
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.wrappers.vector import TokenVectorWrapper

_REPLACEMENT = "\ufffd"  # tokenizers decode broken bytes to it


class TextObservation(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """`Text`: prompt and response as one text, without special tokens. Works on every env of lmgym.

    The characters of the space are those of the tokenizer's single tokens. One that only several tokens make together
    (a rare one, of a tokenizer of bytes) is observed as U+FFFD.

    Args:
        env: the env.

    Raises:
        InvalidArgumentError: for an env that is not of lmgym.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = self._space = text_space(engine_of(env))

    def reset(self, **kwargs: Any) -> tuple[str, dict[str, Any]]:
        """Resets, and observes the prompt."""
        _, info = self.env.reset(**kwargs)
        return self._observe(), info

    def step(self, action: Any) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        """Steps, and observes the text with the new token."""
        _, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(), reward, terminated, truncated, info

    def _observe(self) -> str:
        return _contained(_texts(engine_of(self.env))[0], self._space)


class VectorTextObservation(TokenVectorWrapper):
    """`TextObservation` for vector envs: a tuple of N texts, which is what Gymnasium batches `Text` to."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.single_observation_space = self._space = text_space(engine_of(env))
        self.observation_space = batch_space(self._space, env.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Resets the rows, or those of `options["reset_mask"]`."""
        _, infos = self.env.reset(seed=seed, options=options)
        return self._observe(), infos

    def step(self, actions: Any) -> tuple[tuple[str, ...], Any, Any, Any, dict[str, Any]]:
        """Steps, and observes the texts with the new tokens."""
        _, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            outcomes = cast(RLHFVectorEnv, self.env.unwrapped).last_outcomes
            assert outcomes is not None
            observations = np.full(self.num_envs, None, dtype=object)
            texts = zip(outcomes.prompts, outcomes.responses, strict=True)
            for row, (prompt, response) in zip(np.flatnonzero(infos["_final_obs"]), texts, strict=True):
                observations[row] = _contained(prompt + response, self._space)
            infos = infos | {"final_obs": observations}
        return self._observe(), rewards, terminated, truncated, infos

    def _observe(self) -> tuple[str, ...]:
        return tuple(_contained(text, self._space) for text in _texts(engine_of(self.env)))


def _texts(engine: Engine) -> list[str]:
    """Prompt and response of every row, "" where there never was one."""
    prompts = {row: prompt for row, prompt in enumerate(engine.current) if prompt is not None}
    texts = [prompt.text for prompt in prompts.values()]
    responses = [engine.response_ids(row) for row in prompts]
    completions = engine.lm.completions([prompt.ids for prompt in prompts.values()], responses)
    whole = dict(zip(prompts, map("".join, zip(texts, completions, strict=True)), strict=True))
    return [whole.get(row, "") for row in range(engine.num_rows)]


def text_space(engine: Engine) -> spaces.Text:
    """The texts that prompt and response can be."""
    vocabulary: dict[str, int] = engine.lm.tokenizer.get_vocab()
    tokens = engine.lm.tokenizer.batch_decode([[i] for i in vocabulary.values()], skip_special_tokens=True)
    longest = 1 + max(map(len, vocabulary))  # a token is written with a blank at most
    prompts = [text for texts in engine.task.prompts.values() for text in texts]  # as written, not as tokens read
    length = longest * (engine.width + engine.horizon) + max(map(len, prompts))
    return spaces.Text(length, min_length=0, charset=frozenset("".join(tokens + prompts)) | {" ", _REPLACEMENT})


def _contained(text: str, space: spaces.Text) -> str:
    """A text with U+FFFD in place of characters that the space does not have."""
    known = space.character_set
    return text if known.issuperset(text) else "".join(c if c in known else _REPLACEMENT for c in text)
