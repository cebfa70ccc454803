"""A small action space for agents that cannot handle a vocabulary: the likeliest tokens of the reference.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from lmgym.envs.base import stepping_engine_of
from lmgym.envs.engine import Engine
from lmgym.envs.infos import Columns, add_columns, row_info
from lmgym.envs.single import check_running
from lmgym.envs.token_ids import to_array
from lmgym.errors import InvalidActionError, InvalidArgumentError, check_int
from lmgym.wrappers.vector import TokenVectorWrapper

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class TopKActions(gym.Wrapper[Any, Any, Any, int], RecordConstructorArgs):
    """`Discrete(k)`: action i is the reference's (i + 1)-th likeliest token at this state, 0 its greedy one.

    There is always an EOS: where none is one of the k likeliest, the likeliest EOS is the last action. The actions are
    then still in the order of their probability, and no token comes twice. Rewards and ends are the env's own.

    `info` has `top_k_ids` (k,) int64, the tokens of the actions, and `cut_off_mass`, the reference's probability of all
    other tokens. Both are 0 after an end, where there is no next token.

    Args:
        env: an env of tokens whose reference runs at every step (`kl_coef > 0`, `dense_kl=True`).
        k: 1 to V, and 2 at least where the tokenizer has an EOS.

    Raises:
        InvalidArgumentError: for another env or k.
    """

    def __init__(self, env: gym.Env[Any, int], k: int) -> None:
        RecordConstructorArgs.__init__(self, k=k)
        super().__init__(env)
        check_token_actions(env.action_space, _check_k(stepping_engine_of(env), k))
        self._k = k
        self.action_space = spaces.Discrete(k)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Resets, and adds the tokens of the actions."""
        observation, info = self.env.reset(**kwargs)
        return observation, info | self._info()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps with the token of an action.

        Raises:
            InvalidActionError: for anything that is not an int from 0 to k - 1.
        """
        engine = stepping_engine_of(self.env)
        check_running(engine.running[0])
        index = _as_indices(action, (), self._k)
        ids, _ = top_k_ids(engine, self._k)  # again, because `restore_state` may have moved the env
        observation, reward, terminated, truncated, info = self.env.step(int(ids[0, index]))
        return observation, reward, terminated, truncated, info | self._info()

    def _info(self) -> dict[str, Any]:
        engine = stepping_engine_of(self.env)
        if not engine.running[0]:
            return row_info(_no_columns(1, self._k))
        ids, mass = top_k_ids(engine, self._k)
        return row_info({"top_k_ids": ids, "cut_off_mass": mass})


class VectorTopKActions(TokenVectorWrapper):
    """`TopKActions` for vector envs: `top_k_ids` (N, k) and `cut_off_mass` (N,), 0 in rows without a next token."""

    def __init__(self, env: VectorEnv[Any, Any, Any], k: int) -> None:
        super().__init__(env)
        check_token_actions(env.single_action_space, _check_k(stepping_engine_of(env), k))
        self._k = k
        self.single_action_space = spaces.Discrete(k)
        self.action_space = batch_space(self.single_action_space, env.num_envs)
        self._ids: Ints | None = None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the rows, or those of `options["reset_mask"]`."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return observations, self._add_ids(infos, self._rows(options))

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps with the tokens of actions (N,); those of rows that are being reset do not matter."""
        engine = stepping_engine_of(self.env)
        indices = _as_indices(actions, (self.num_envs,), self._k, engine.running)
        if self._ids is None:
            self._ids, _ = top_k_ids(engine, self._k)
        tokens = self._ids[np.arange(self.num_envs), indices]
        observations, rewards, terminated, truncated, infos = self.env.step(tokens)
        return observations, rewards, terminated, truncated, self._add_ids(infos, self._rows(None))

    def _add_ids(self, infos: dict[str, Any], rows: Bools) -> dict[str, Any]:
        """Infos with the tokens of the next actions, for rows (N,)."""
        engine = stepping_engine_of(self.env)
        nothing = _no_columns(self.num_envs, self._k)
        columns = nothing
        if engine.running.any():
            self._ids, mass = top_k_ids(engine, self._k)
            columns = {
                "top_k_ids": np.where(engine.running[:, None], self._ids, 0),
                "cut_off_mass": np.where(engine.running, mass, 0.0),
            }
        return add_columns(infos, columns, rows, nothing)


def _no_columns(rows: int, k: int) -> Columns:
    return {"top_k_ids": np.zeros((rows, k), dtype=np.int64), "cut_off_mass": np.zeros(rows)}


def top_k_ids(engine: Engine, k: int) -> tuple[Ints, npt.NDArray[np.float64]]:
    """(N, k) the tokens of the actions, and (N,) the reference's probability of all others."""
    logits = engine.reference_logits().float()
    ids = logits.topk(k).indices
    eos = torch.from_numpy(_eos_ids(engine)).to(logits.device)
    if len(eos):
        without = ~torch.isin(ids, eos).any(-1)
        ids[:, -1] = torch.where(without, eos[logits[:, eos].argmax(-1)], ids[:, -1])
    return ids.cpu().numpy(), _mass_without(logits, ids).cpu().numpy().astype(np.float64)


def check_token_actions(space: spaces.Space[Any], engine: Engine) -> None:
    """Raises `InvalidArgumentError` unless an action is a token id."""
    if space != spaces.Discrete(engine.lm.vocab_size):
        raise InvalidArgumentError(
            f"`env` must have the actions Discrete({engine.lm.vocab_size}), one a token, got {space}."
        )


def _mass_without(logits: Tensor, ids: Tensor) -> Tensor:
    """(N,) probability of the tokens that are not in ids (N, k), without the rounding of 1 - sum."""
    return (logits.scatter(1, ids, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)).exp()


def _eos_ids(engine: Engine) -> Ints:
    return np.flatnonzero(engine.is_eos & engine.is_legal)


def _check_k(engine: Engine, k: Any) -> Engine:
    check_int("k", k, 2 if len(_eos_ids(engine)) else 1, engine.lm.vocab_size - len(engine.lm.holes))
    return engine


def _as_indices(actions: Any, shape: tuple[int, ...], k: int, live: Bools | None = None) -> Ints:
    """Actions as an int64 array of a shape, 0 where not live."""
    array = to_array(actions)
    needed = np.ones(shape, dtype=np.bool_) if live is None else live
    whole = array is not None and array.shape == shape and np.issubdtype(array.dtype, np.integer)
    if array is None or not whole or not ((array >= 0) & (array < k) | ~needed).all():
        raise InvalidActionError(f"`action` must be ints from 0 to {k - 1} of shape {shape}, got {actions!r}.")
    return np.where(needed, array, 0).astype(np.int64)
