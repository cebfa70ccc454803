"""Buffers of Stable-Baselines3 whose minibatches are stretches, and a replay buffer as a file.

A stretch is successive steps of a row. A language model reads its steps in one forward (`agents.sb3.network.Trunk`).

Shapes: S steps that a buffer holds of each row, N rows, L columns.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import load_file, save_file
from stable_baselines3.common.buffers import DictReplayBuffer, DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from lmgym.errors import InvalidArgumentError


class StretchReplayBuffer(DictReplayBuffer):
    """A replay buffer that draws stretches of successive steps of a row; any step is as likely as another.

    In a full buffer the oldest steps follow the newest.

    Args:
        stretch: steps of each; 1 is SB3's own way.
    """

    def __init__(self, *args: Any, stretch: int = 1, **kwargs: Any) -> None:
        self._stretch = stretch
        super().__init__(*args, **kwargs)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> DictReplayBufferSamples:  # type: ignore[override]
        """Draws `batch_size` steps."""
        stretches = -(-batch_size // self._stretch)
        starts = np.random.randint(0, self.size(), size=(stretches, 1))  # noqa: NPY002 - what SB3 draws from
        rows = np.random.randint(0, self.n_envs, size=(stretches, 1))  # noqa: NPY002
        steps = (starts + np.arange(self._stretch)) % self.size()
        return self._at(steps.ravel()[:batch_size], np.repeat(rows, self._stretch)[:batch_size], env)

    def _at(self, steps: Any, rows: Any, env: VecNormalize | None) -> DictReplayBufferSamples:
        """The steps (n,) of rows (n,)."""

        def select(observations: dict[str, Any]) -> Any:
            chosen = self._normalize_obs({name: x[steps, rows] for name, x in observations.items()}, env)
            return {name: self.to_torch(x) for name, x in cast(Any, chosen).items()}

        return DictReplayBufferSamples(
            observations=select(self.observations),
            actions=self.to_torch(self.actions[steps, rows]),
            next_observations=select(self.next_observations),
            dones=self.to_torch((self.dones[steps, rows] * (1 - self.timeouts[steps, rows]))[:, None]),
            rewards=self.to_torch(self._normalize_reward(self.rewards[steps, rows, None], env)),
        )


class Stretches:
    """Mixed into a rollout buffer of SB3: its minibatches are stretches of a row, `stretch` steps or what is left."""

    def __init__(self, *args: Any, stretch: int = 1, **kwargs: Any) -> None:
        self._stretch = stretch
        super().__init__(*args, **kwargs)

    def get(self: Any, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Yields minibatches of `batch_size` steps, in a random order of the stretches; the whole rollout for None."""
        if batch_size is None:
            yield from super().get()  # type: ignore[misc]
            return
        next(super().get(1))  # type: ignore[misc] # lays the steps out, row after row
        n = self.buffer_size
        stretches = []
        for row in range(0, n * self.n_envs, n):
            stretches += np.split(np.arange(row, row + n), range(self._stretch, n, self._stretch))
        drawn = np.random.permutation(len(stretches))  # noqa: NPY002 - what SB3 draws from
        order = np.concatenate([stretches[i] for i in drawn])
        for start in range(0, len(order), batch_size):
            yield self._get_samples(order[start : start + batch_size])


class StretchRolloutBuffer(Stretches, DictRolloutBuffer):
    """The rollout buffer of PPO and TRPO, in stretches."""


def save_replay(buffer: DictReplayBuffer, path: Path, size: int) -> None:
    """Writes the first `size` steps of a replay buffer as safetensors; `buffer.pos` is not in the file."""
    save_file({name: array[:size] for name, array in _replay_arrays(buffer).items()}, path)


def load_replay(buffer: DictReplayBuffer, path: Path, position: int) -> None:
    """Fills a replay buffer with what `save_replay` wrote.

    Args:
        buffer: of the same shape; what it held is forgotten.
        path: the file.
        position: `buffer.pos` when it was saved, where the next step goes.

    Raises:
        InvalidArgumentError: for a buffer of another shape.
    """
    saved = load_file(path)
    size = len(saved["actions"])
    is_full = position < size
    for name, array in _replay_arrays(buffer).items():
        fits = size == len(array) if is_full else size < len(array)
        if not fits or saved[name].shape[1:] != array.shape[1:]:
            raise InvalidArgumentError(
                f"`directory` must hold a replay buffer with {name} of shape {array.shape}, got {saved[name].shape}: "
                "`kwargs.buffer_size` and `n_envs` must be those of the run that saved it."
            )
        array[:size] = saved[name]
    buffer.pos = position
    buffer.full = is_full


def _replay_arrays(buffer: DictReplayBuffer) -> dict[str, Any]:
    """The arrays (S, N, ...) of a replay buffer by name."""
    arrays = {name: getattr(buffer, name) for name in ("actions", "rewards", "dones", "timeouts")}
    for kind in ("observations", "next_observations"):
        for name, array in getattr(buffer, kind).items():
            arrays[f"{kind}.{name}"] = array  # (S, N, L)
    return arrays
