"""The rows' streams of prompts, each with a generator of its own.

Shapes: N rows, k rows a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding

from lmgym.envs.prompts import Prompt, PromptOrder, PromptSet
from lmgym.errors import InvalidArgumentError


class PromptStreams:
    """N endless streams of prompts; rows i*k .. i*k + k - 1 share their seed, and so draw the same prompts.

    A sequential order deals the prompts out: row i starts at prompt i // k and takes every (N / k)-th.

    Args:
        prompts: what is drawn from. order: "shuffle" or "sequential". num_envs: N. group_size: k.
    """

    def __init__(self, prompts: PromptSet, order: str, num_envs: int, group_size: int) -> None:
        self._group_size = group_size
        fresh = np.random.SeedSequence().generate_state(num_envs).tolist()
        seeds = [fresh[row // group_size] for row in range(num_envs)]
        self._rngs = [seeding.np_random(int(seed))[0] for seed in seeds]
        self._orders = [
            PromptOrder(
                prompts,
                order,
                lambda row=row: self._rngs[row],  # type: ignore[misc]
                start=row // group_size,
                stride=num_envs // group_size,
            )
            for row in range(num_envs)
        ]

    def __getitem__(self, row: int) -> PromptOrder:
        """The stream of a row."""
        return self._orders[row]

    def seed(self, seeds: Sequence[int | None], rows: npt.NDArray[np.bool_]) -> None:
        """Starts the streams of rows (N,) again; those whose group has no seed go on as they are.

        Args:
            seeds: N of them; a group has the seed of its first row.
        """
        for row in np.flatnonzero(rows).tolist():
            seed = seeds[row - row % self._group_size]
            if seed is not None:
                self._rngs[row] = seeding.np_random(seed)[0]
                self._orders[row].restart()

    def take(self, count: int) -> list[Prompt]:
        """Takes so many prompts, one a row in turn."""
        return [self._orders[i % len(self._orders)].take() for i in range(count)]

    def state(self) -> list[dict[str, Any]]:
        """Where each stream stands: its permutation as an array, its position in it, and its generator's state."""
        state = []
        for order, rng in zip(self._orders, self._rngs, strict=True):
            epoch, position = order.position
            state.append({"epoch": epoch, "place": position, "rng": rng.bit_generator.state})
        return state

    def set_state(self, state: Sequence[dict[str, Any]]) -> None:
        """Puts the streams back where `state` found them.

        Raises:
            InvalidArgumentError: for the state of another number of rows.
        """
        if len(state) != len(self._orders):
            raise InvalidArgumentError(f"`state` must be that of {len(self._orders)} rows, got {len(state)}.")
        for order, rng, row in zip(self._orders, self._rngs, state, strict=True):
            rng.bit_generator.state = row["rng"]
            order.position = (None if row["epoch"] is None else np.array(row["epoch"]), row["place"])
