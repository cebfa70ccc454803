"""The reference's view of a state as the observation: a vector, which classic agents can take.

Shapes: N rows, D width of the model.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from lmgym.envs.base import stepping_engine_of
from lmgym.envs.engine import Engine
from lmgym.errors import InvalidArgumentError
from lmgym.models.markov import MarkovLM
from lmgym.wrappers.vector import TokenVectorWrapper

Floats = npt.NDArray[np.float32]


class EmbeddingObservation(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """`Box float32 (D,)`: the last hidden state of the reference, the input of its LM head, at the state.

    It comes from the forward that the env's own reward needs, so it costs nothing more. A terminated state has no next
    token and no value: it is all zeros. A truncated one has a value to bootstrap from, and costs a forward.

    A table of transitions sees only the last one or two tokens, and neither how many there are nor what the reward has
    seen of them. Different states then look alike, and no agent can tell them apart. Such a reference raises, unless
    `allow_partial` is True.

    Args:
        env: an env of tokens whose reference runs at every step (`kl_coef > 0`, `dense_kl=True`).
        allow_partial: takes a table too; the problem is then partially observed.

    Raises:
        InvalidArgumentError: for another env.
    """

    def __init__(self, env: gym.Env[Any, Any], *, allow_partial: bool = False) -> None:
        RecordConstructorArgs.__init__(self, allow_partial=allow_partial)
        super().__init__(env)
        self.observation_space = _space(stepping_engine_of(env), allow_partial)

    def reset(self, **kwargs: Any) -> tuple[Floats, dict[str, Any]]:
        """Resets, and observes the prompt."""
        _, info = self.env.reset(**kwargs)
        return self._observe(), info

    def step(self, action: Any) -> tuple[Floats, Any, bool, bool, dict[str, Any]]:
        """Steps, and observes the next state."""
        _, reward, terminated, truncated, info = self.env.step(action)
        observation = np.zeros(self.observation_space.shape or (), np.float32) if terminated else self._observe()
        return observation, reward, terminated, truncated, info

    def _observe(self) -> Floats:
        return _as_array(stepping_engine_of(self.env).reference_hidden()[0])


class VectorEmbeddingObservation(TokenVectorWrapper):
    """`EmbeddingObservation` for vector envs: `Box float32 (N, D)`, and (D,) arrays in `infos["final_obs"]`."""

    def __init__(self, env: VectorEnv[Any, Any, Any], *, allow_partial: bool = False) -> None:
        super().__init__(env)
        self.single_observation_space = _space(stepping_engine_of(env), allow_partial)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._observations = np.zeros(self.observation_space.shape or (), np.float32)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Resets the rows, or those of `options["reset_mask"]`."""
        _, infos = self.env.reset(seed=seed, options=options)
        self._observe_running()
        return self._observations.copy(), infos

    def step(self, actions: Any) -> tuple[Floats, Any, Any, Any, dict[str, Any]]:
        """Steps, and observes the next states."""
        engine = stepping_engine_of(self.env)
        engine.keep_hidden()
        _, rewards, terminated, truncated, infos = self.env.step(actions)
        self._observations[terminated] = 0.0
        if truncated.any():
            final = engine.final_hidden
            assert final is not None
            self._observations[truncated] = _as_array(final)[truncated]
        if "final_obs" in infos:
            observations = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(infos["_final_obs"]):
                observations[row] = self._observations[row].copy()
            infos = infos | {"final_obs": observations}
        self._observe_running()
        return self._observations.copy(), rewards, terminated, truncated, infos

    def _observe_running(self) -> None:
        """Observes the rows inside an episode; the others stay as they ended."""
        engine = stepping_engine_of(self.env)
        if engine.running.any():
            self._observations[engine.running] = _as_array(engine.reference_hidden())[engine.running]


def _space(engine: Engine, allow_partial: bool) -> spaces.Box:
    if isinstance(engine.lm.model, MarkovLM) and not allow_partial:
        raise InvalidArgumentError(
            "`env` must have a reference whose hidden state tells states apart, and a table of transitions sees only "
            "the last tokens: take OneHotObservation, or `allow_partial=True` for a partially observed problem."
        )
    engine.keep_hidden()
    width = engine.lm.model.get_output_embeddings().in_features
    return spaces.Box(-np.inf, np.inf, (width,), np.float32)  # there is no bound that all models respect


def _as_array(hidden: Tensor) -> Floats:
    """A copy, because the decoder overwrites its tensors."""
    return hidden.float().cpu().numpy().copy()
