"""Masks of the tokens that are likely under the reference, by top-k or top-p, for agents that mask their actions.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from torch import Tensor

from lmgym.envs.base import stepping_engine_of
from lmgym.envs.engine import Engine
from lmgym.envs.infos import add_columns
from lmgym.errors import InvalidArgumentError, check_int
from lmgym.models.sampling import Sampler
from lmgym.wrappers.top_k_actions import check_token_actions
from lmgym.wrappers.vector import TokenVectorWrapper

Bools = npt.NDArray[np.bool_]


class ActionMask(gym.Wrapper[Any, int, Any, int], RecordConstructorArgs):
    """`info["action_mask"]` (V,) bool, True on the reference's likeliest tokens at the state, and on every EOS.

    After an end it is True on all tokens of the tokenizer. `action_masks()` gives it at any time, under the name that
    MaskablePPO of sb3-contrib looks for. The mask is advice: actions, rewards and ends are the env's own.

    Args:
        env: an env of tokens whose reference runs at every step (`kl_coef > 0`, `dense_kl=True`).
        top_p: allows the smallest set of likeliest tokens whose mass reaches it, in (0, 1].
        top_k: allows the k likeliest tokens. Exactly one of the two is given.

    Attributes:
        sampler: top-p or top-k; the mask is the support of its distribution.

    Raises:
        InvalidArgumentError: for another env or other values.
    """

    def __init__(self, env: gym.Env[Any, int], *, top_p: float | None = None, top_k: int | None = None) -> None:
        RecordConstructorArgs.__init__(self, top_p=top_p, top_k=top_k)
        super().__init__(env)
        self.sampler = _sampler(top_p, top_k)
        check_token_actions(env.action_space, stepping_engine_of(env))

    def action_masks(self) -> Bools:
        """(V,) bool at the present state; after the end of an episode all tokens of the tokenizer."""
        return action_masks(stepping_engine_of(self.env), self.sampler)[0]

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Resets, and adds the mask."""
        observation, info = self.env.reset(**kwargs)
        return observation, info | {"action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps, and adds the mask of the next state."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info | {"action_mask": self.action_masks()}


class VectorActionMask(TokenVectorWrapper):
    """`ActionMask` for vector envs: `infos["action_mask"]` (N, V)."""

    def __init__(self, env: VectorEnv[Any, Any, Any], *, top_p: float | None = None, top_k: int | None = None) -> None:
        super().__init__(env)
        self.sampler = _sampler(top_p, top_k)
        check_token_actions(env.single_action_space, stepping_engine_of(env))
        self._masks: Bools | None = None

    def action_masks(self) -> Bools:
        """(N, V) bool at the present states; after the end of an episode all tokens of the tokenizer."""
        if self._masks is None:
            self._masks = action_masks(stepping_engine_of(self.env), self.sampler)
        return self._masks.copy()

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the rows, or those of `options["reset_mask"]`."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return observations, self._add_masks(infos, self._rows(options))

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps, and adds the masks of the next states."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards, terminated, truncated, self._add_masks(infos, self._rows(None))

    def _add_masks(self, infos: dict[str, Any], rows: Bools) -> dict[str, Any]:
        self._masks = None
        at_end = {"action_mask": _legal(stepping_engine_of(self.env))}
        return add_columns(infos, {"action_mask": self.action_masks()}, rows, at_end)


def action_masks(engine: Engine, sampler: Sampler) -> Bools:
    """(N, V) bool: the support of the sampler's distribution, with every EOS; all legal tokens outside an episode."""
    masks = _legal(engine)
    if engine.running.any():
        support = find_support(engine.reference_logits(), sampler, engine.is_eos)
        masks[engine.running] &= support.cpu().numpy()[engine.running]
    return masks


def _legal(engine: Engine) -> Bools:
    """(N, V) bool: the tokens of the tokenizer."""
    return np.repeat(engine.is_legal[None], engine.num_rows, axis=0)


def find_support(logits: Tensor, sampler: Sampler, is_eos: Bools | Tensor) -> Tensor:
    """(N, V) bool: the tokens that a sampler may draw from logits (N, V), and every EOS."""
    return sampler.adjust_logits(logits, 0).isfinite() | torch.as_tensor(is_eos, device=logits.device)


def _sampler(top_p: float | None, top_k: int | None) -> Sampler:
    if (top_p is None) == (top_k is None):
        raise InvalidArgumentError(
            f"Exactly one of `top_p` and `top_k` must be given, got top_p={top_p!r} and top_k={top_k!r}."
        )
    if top_p is not None:
        return Sampler(top_p=top_p)
    check_int("top_k", top_k, 1)
    return Sampler(top_k=top_k)  # type: ignore[arg-type]
