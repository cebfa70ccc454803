"""Rewards with noise on top: the same problem in expectation, seen through a noisy judge."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from lmgym.errors import InvalidArgumentError, check_int, check_number
from lmgym.rewards.base import RewardFunction, score


class NoisyReward:
    """A reward with independent Gaussian noise, drawn anew at every call: the same response scores differently.

    The noise has mean 0, so the objective and its optimum are those of `expected`. Draws are made in the order of the
    calls: two instances with one seed agree bitwise when they are called alike.

    Args:
        reward: the reward inside.
        sigma: standard deviation of the noise, >= 0, in units of the score.
        seed: of the noise.

    Attributes:
        expected: the reward inside, what is paid on average.

    Raises:
        InvalidArgumentError: if an argument has a value it cannot have.
    """

    def __init__(self, reward: RewardFunction, sigma: float, seed: int = 0) -> None:
        if not callable(reward):
            raise InvalidArgumentError(f"`reward` must be a callable, got {reward!r}.")
        check_number("sigma", sigma, 0)
        check_int("seed", seed, 0)
        self.expected = reward
        self.sigma = sigma
        self._rng = np.random.default_rng(seed)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode, noise included.

        Raises:
            RewardError: if the reward inside breaks its contract.
        """
        scores = np.array(score(self.expected, prompts, completions, **columns))
        return (scores + self.sigma * self._rng.standard_normal(len(scores))).tolist()

    def reseed(self, seed: int) -> None:
        """Begins the noise anew: what an environment does when it is reset with a seed."""
        self._rng = np.random.default_rng(seed)

    def get_state(self) -> dict[str, Any]:
        """Where the noise stands, as a JSON value."""
        return copy.deepcopy(dict(self._rng.bit_generator.state))

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where `get_state` was called.

        Raises:
            InvalidArgumentError: if this is not such a state.
        """
        try:
            self._rng.bit_generator.state = state
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidArgumentError(f"`state` must come from `NoisyReward.get_state`, got {state!r}.") from error
