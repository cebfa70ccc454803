"""Makes the envs of `gym.make` and `gym.make_vec`, with the wrappers that their keyword arguments name.

A program that takes only an id cannot add wrappers of its own, but it passes keyword arguments on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmgym.envs.bandit import RLHFBanditEnv, RLHFBanditVectorEnv
from lmgym.envs.settings import OBS_FORMATS
from lmgym.envs.single import RLHFEnv
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import check_choice
from lmgym.wrappers.embedding_observation import EmbeddingObservation, VectorEmbeddingObservation
from lmgym.wrappers.one_hot_observation import OneHotObservation, VectorOneHotObservation
from lmgym.wrappers.text_actions import TextActions
from lmgym.wrappers.text_observation import TextObservation
from lmgym.wrappers.top_k_actions import TopKActions, VectorTopKActions

Wrap = Callable[[Any], Any]


class EnvMaker:
    """Makes envs of a class, for Gymnasium's registry.

    Args:
        env_class: of the env.
        wrappers: by those values of `obs_format` that the class itself does not take.
        top_k: wraps an env so that it has k actions.
    """

    def __init__(
        self, env_class: Callable[..., Any], wrappers: dict[str, Wrap], top_k: Callable[[Any, int], Any]
    ) -> None:
        self.metadata: dict[str, Any] = env_class.metadata  # type: ignore[attr-defined]
        self._class = env_class
        self._wrappers = wrappers
        self._top_k = top_k

    def __call__(self, *, obs_format: str = "dict", top_k: int | None = None, **kwargs: Any) -> Any:
        """Makes an env.

        Args:
            obs_format: one of the class, or "embedding" (`EmbeddingObservation`) or "onehot" (`OneHotObservation`).
            top_k: the number of actions (`TopKActions`); None is one a token of the vocabulary.
            kwargs: of the class.
        """
        check_choice("obs_format", obs_format, (*OBS_FORMATS, *self._wrappers))
        wrap = self._wrappers.get(obs_format)
        env = self._class(obs_format="dict" if wrap else obs_format, **kwargs)
        if top_k is not None:
            env = self._top_k(env, top_k)
        return wrap(env) if wrap else env


class TextEnvMaker:
    """Makes the env whose observations and actions are texts, for Gymnasium's registry."""

    metadata = RLHFBanditEnv.metadata

    def __call__(self, **kwargs: Any) -> Any:
        """Makes an env of the arguments of the bandit."""
        return TextObservation(TextActions(RLHFBanditEnv(**kwargs)))


_SINGLE: dict[str, Wrap] = {"embedding": EmbeddingObservation, "onehot": OneHotObservation}
_VECTOR: dict[str, Wrap] = {"embedding": VectorEmbeddingObservation, "onehot": VectorOneHotObservation}

make_token_env = EnvMaker(RLHFEnv, _SINGLE, TopKActions)
make_token_vector_env = EnvMaker(RLHFVectorEnv, _VECTOR, VectorTopKActions)
make_bandit_env = EnvMaker(RLHFBanditEnv, _SINGLE, TopKActions)
make_bandit_vector_env = EnvMaker(RLHFBanditVectorEnv, _VECTOR, VectorTopKActions)
make_text_env = TextEnvMaker()
