"""The whole state of a small problem as a vector of zeros and ones, for networks that take vectors.

Shapes: N rows, P prompt columns, T response columns, L = P + T, V vocabulary, S states of the reward's automaton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from lmgym.automata import Automaton
from lmgym.envs.base import engine_of
from lmgym.envs.engine import Engine
from lmgym.envs.spaces import observation_space
from lmgym.errors import InvalidArgumentError
from lmgym.models.markov import MarkovLM
from lmgym.rewards.automaton import AutomatonReward
from lmgym.rewards.base import remove_noise
from lmgym.wrappers.vector import TokenVectorWrapper

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

MAX_ENTRIES = 100_000  # of one observation: 400 kB


class OneHotObservation(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """`Box float32` of zeros and ones that is the whole state: states that look alike are alike.

    It holds the number of tokens chosen so far, one of T + 1; then the P prompt columns and the T response columns, one
    of V each, zeros where there is no token. Where the reference is a transition table and the reward one automaton for
    all prompts, less of the tokens matters: the last one or two of them, one of V each, and the state of the automaton,
    one of S.

    Args:
        env: an env of lmgym with observations of its own.

    Raises:
        InvalidArgumentError: for another env, and where the vector would have more than 100,000 entries.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        _check_observations(env.observation_space, engine_of(env))
        self._encode = _Encoding.of(engine_of(env))
        self.observation_space = self._encode.space

    def reset(self, **kwargs: Any) -> tuple[Floats, dict[str, Any]]:
        """Resets, and observes the prompt."""
        observation, info = self.env.reset(**kwargs)
        return self._encode(_tokens(observation)[None])[0], info

    def step(self, action: Any) -> tuple[Floats, Any, bool, bool, dict[str, Any]]:
        """Steps, and observes the next state."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._encode(_tokens(observation)[None])[0], reward, terminated, truncated, info


class VectorOneHotObservation(TokenVectorWrapper):
    """`OneHotObservation` for vector envs: one row each, and vectors in `infos["final_obs"]`."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        _check_observations(env.single_observation_space, engine_of(env))
        self._encode = _Encoding.of(engine_of(env))
        self.single_observation_space = self._encode.space
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Resets the rows, or those of `options["reset_mask"]`."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return self._encode(_tokens(observations)), infos

    def step(self, actions: Any) -> tuple[Floats, Any, Any, Any, dict[str, Any]]:
        """Steps, and observes the next states."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            final = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(infos["_final_obs"]):
                final[row] = self._encode(_tokens(infos["final_obs"][row])[None])[0]
            infos = infos | {"final_obs": final}
        return self._encode(_tokens(observations)), rewards, terminated, truncated, infos


def _tokens(observation: Any) -> Ints:
    """Token ids of an observation of the env, -1 where there is none."""
    if isinstance(observation, dict):
        return np.where(observation["attention_mask"] == 1, observation["input_ids"], -1)
    return np.asarray(observation)


def _check_observations(space: spaces.Space[Any], engine: Engine) -> None:
    own = [observation_space(engine, obs_format) for obs_format in ("dict", "flat")]
    if space not in own:
        raise InvalidArgumentError(f"`env` must have the observations of lmgym, `dict` or `flat`, got {space}.")


@dataclass(frozen=True, eq=False)
class _Encoding:
    """Makes vectors from token ids.

    Attributes:
        width: P. horizon: T. vocab_size: V.
        automaton: its state stands for the tokens so far; None where all tokens are in the vector.
        order: the number of last tokens that matter beside that state.
    """

    width: int
    horizon: int
    vocab_size: int
    automaton: Automaton | None
    order: int

    @classmethod
    def of(cls, engine: Engine) -> _Encoding:
        automaton = _whole_state(engine)
        order = 0 if automaton is None else engine.lm.model.config.order
        encoding = cls(engine.width, engine.horizon, engine.lm.vocab_size, automaton, order)
        if encoding.size > MAX_ENTRIES:
            raise InvalidArgumentError(
                f"`env` must have at most {MAX_ENTRIES} entries in an observation of ones and zeros, got "
                f"{encoding.size}, for a vocabulary of {encoding.vocab_size}: take EmbeddingObservation, where the "
                "reference is a table with `allow_partial=True`."
            )
        return encoding

    @property
    def size(self) -> int:
        """Entries of a vector."""
        if self.automaton is None:
            return self.horizon + 1 + (self.width + self.horizon) * self.vocab_size
        return self.horizon + 1 + self.order * self.vocab_size + len(self.automaton.transitions)

    @property
    def space(self) -> spaces.Box:
        """The observation space of one row."""
        return spaces.Box(0, 1, (self.size,), np.float32)

    def __call__(self, tokens: Ints) -> Floats:
        """(n, size) of token ids (n, L), -1 where there is none."""
        rows = np.arange(len(tokens))
        lengths = (tokens[:, self.width :] >= 0).sum(1)
        vectors = np.zeros((len(tokens), self.size), dtype=np.float32)
        vectors[rows, lengths] = 1
        start = self.horizon + 1
        if self.automaton is None:
            row, column = (tokens >= 0).nonzero()
            vectors[row, start + column * self.vocab_size + tokens[row, column]] = 1
            return vectors
        for i in range(self.order):
            last = tokens[rows, self.width + lengths - 1 - i]
            known = last >= 0
            vectors[rows[known], start + i * self.vocab_size + last[known]] = 1
        responses = [row[self.width : self.width + n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        vectors[rows, start + self.order * self.vocab_size + self.automaton.read(responses)[0]] = 1
        return vectors


def _whole_state(engine: Engine) -> Automaton | None:
    """The automaton whose state, with the last tokens and their number, is the whole state; None where there is none.

    It is not the whole state where the last reward depends on more of the past: on payments for tokens, or on the
    reference's log-probs with `dense_kl=False`. Nor is it where every prompt has an automaton of its own.
    """
    reward = remove_noise(engine.reward)
    if not isinstance(engine.lm.model, MarkovLM) or not isinstance(reward, AutomatonReward):
        return None
    if engine.task.kl_coef > 0 and not engine.task.dense_kl:
        return None
    automaton = reward.of_all_prompts
    return automaton if automaton is not None and automaton.token_payments is None else None
