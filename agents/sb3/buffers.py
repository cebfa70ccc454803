"""Buffers of Stable-Baselines3 whose minibatches are stretches: successive steps of a row, drawn at random together.

A language model reads the steps of a stretch in one forward (`agents.sb3.network.Trunk`).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, cast

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize


class StretchReplayBuffer(DictReplayBuffer):
    """A replay buffer that draws stretches of successive steps of a row; any step is as likely as another.

    In a full buffer the oldest steps come behind the newest.

    Args:
        stretch: steps each; 1 is SB3's own way.
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
        def tensors(observations: dict[str, Any]) -> Any:
            chosen = self._normalize_obs({name: x[steps, rows] for name, x in observations.items()}, env)
            return {name: self.to_torch(x) for name, x in cast(Any, chosen).items()}

        return DictReplayBufferSamples(
            observations=tensors(self.observations),
            actions=self.to_torch(self.actions[steps, rows]),
            next_observations=tensors(self.next_observations),
            dones=self.to_torch((self.dones[steps, rows] * (1 - self.timeouts[steps, rows]))[:, None]),
            rewards=self.to_torch(self._normalize_reward(self.rewards[steps, rows, None], env)),
        )


class Stretches:
    """Mixed into a rollout buffer of SB3: its minibatches are stretches of a row, `stretch` steps or what is left."""

    def __init__(self, *args: Any, stretch: int = 1, **kwargs: Any) -> None:
        self._stretch = stretch
        super().__init__(*args, **kwargs)

    def get(self: Any, batch_size: int | None = None) -> Generator[Any, None, None]:
        if batch_size is None:
            yield from super().get()  # type: ignore[misc]
            return
        next(super().get(1))  # type: ignore[misc] # lays the steps out, row after row
        n, pieces = self.buffer_size, []
        for row in range(0, n * self.n_envs, n):
            pieces += np.split(np.arange(row, row + n), range(self._stretch, n, self._stretch))
        drawn = np.random.permutation(len(pieces))  # noqa: NPY002 - what SB3 draws from
        order = np.concatenate([pieces[i] for i in drawn])
        for start in range(0, len(order), batch_size):
            yield self._get_samples(order[start : start + batch_size])


class StretchRolloutBuffer(Stretches, DictRolloutBuffer):
    """The rollout buffer of PPO and TRPO, in stretches."""
