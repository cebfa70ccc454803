"""Rewards with noise: the same problem in expectation, with scores that vary from call to call."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from lmgym.errors import InvalidArgumentError, check_int, check_number
from lmgym.rewards.base import RewardFunction, bind_tokenizer, score


class NoisyReward:
    """A reward with independent Gaussian noise, drawn anew at every call: the same response scores differently.

    The noise has mean 0, so the objective and its optimum are those of `expected`. Draws are made in the order of the
    calls: two instances with one seed agree bitwise when they are called alike. Noise on a noisy reward has a stream of
    its own, whatever the seeds: their variances add.

    Args:
        reward: the reward inside.
        sigma: standard deviation of the noise, >= 0, in units of the score.
        seed: of the noise.

    Attributes:
        expected: the reward inside, the mean of the scores.

    Raises:
        InvalidArgumentError: if an argument has a value it cannot have.
    """

    reads_plain_text = True  # it passes on what it is given

    def __init__(self, reward: RewardFunction, sigma: float, seed: int = 0) -> None:
        if not callable(reward):
            raise InvalidArgumentError(f"`reward` must be a callable, got {reward!r}.")
        check_number("sigma", sigma, 0)
        check_int("seed", seed, 0)
        self.expected = reward
        self.sigma = sigma
        self._depth: int = reward._depth + 1 if isinstance(reward, NoisyReward) else 0
        self._rng = self._begin(seed)

    def _begin(self, seed: int) -> np.random.Generator:
        if not self._depth:
            return np.random.default_rng(seed)
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(self._depth,)))

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode, noise included.

        Raises:
            RewardError: if the reward inside breaks its contract.
        """
        scores = np.array(score(self.expected, prompts, completions, **columns))
        return (scores + self.sigma * self._rng.standard_normal(len(scores))).tolist()

    def reseed(self, seed: int) -> None:
        """Restarts the noise, and that of a noisy reward inside; an env calls this when it is reset with a seed."""
        self._rng = self._begin(seed)
        if isinstance(self.expected, NoisyReward):
            self.expected.reseed(seed)

    def for_tokenizer(self, tokenizer: Any) -> NoisyReward:
        """The same noise on the reward inside, for responses of a policy with this tokenizer."""
        inside = bind_tokenizer(self.expected, tokenizer)
        if inside is self.expected:
            return self
        bound = copy.copy(self)
        bound.expected = inside
        return bound

    def get_state(self) -> dict[str, Any]:
        """The state of the noise, as a JSON value; `inside` is the state of a noisy reward inside."""
        state = copy.deepcopy(dict(self._rng.bit_generator.state))
        if isinstance(self.expected, NoisyReward):
            state["inside"] = self.expected.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where `get_state` was called.

        Raises:
            InvalidArgumentError: if this is not such a state.
        """
        try:
            own = {name: value for name, value in state.items() if name != "inside"}
            self._rng.bit_generator.state = own
            if isinstance(self.expected, NoisyReward):
                self.expected.set_state(state["inside"])
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise InvalidArgumentError(f"`state` must come from `NoisyReward.get_state`, got {state!r}.") from error
