"""Several rewards as one: their weighted sum, where a reward may say that it does not apply to an episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmgym.errors import InvalidArgumentError, RewardError, check_number
from lmgym.rewards.base import RewardFunction, bind_tokenizer, remove_noise, score_range, scores_or_none


class CombinedReward:
    """The weighted sum of rewards. None from one of them says that it does not apply, and adds nothing.

    Args:
        rewards: the parts. weights: what each is multiplied by; None is 1 each.

    Raises:
        InvalidArgumentError: for weights that are not one finite number a part.
    """

    reads_plain_text = True  # it passes on what it is given

    def __init__(self, rewards: Sequence[RewardFunction], weights: Sequence[float] | None = None) -> None:
        check_weights(rewards, weights)
        self.rewards = tuple(rewards)
        self.weights = tuple(1.0 for _ in rewards) if weights is None else tuple(float(w) for w in weights)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode.

        Raises:
            RewardError: if a part breaks its contract, or none applies to an episode.
        """
        totals = np.zeros(len(completions))
        applies = np.zeros(len(completions), dtype=np.bool_)
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            for i, x in enumerate(scores_or_none(reward, prompts, completions, columns)):
                if x is not None:
                    totals[i] += weight * x
                    applies[i] = True
        if not applies.all():
            prompt = prompts[int(np.flatnonzero(~applies)[0])]
            raise RewardError(
                f"At least one of the {len(self.rewards)} rewards must apply to every episode, and all returned None "
                f"for one of the prompt {prompt!r}."
            )
        return totals.tolist()

    def _with(self, rewards: Sequence[RewardFunction]) -> CombinedReward:
        """The same weights on other parts; itself where they are its own."""
        same = all(new is old for new, old in zip(rewards, self.rewards, strict=True))
        return self if same else CombinedReward(rewards, self.weights)

    @property
    def expected(self) -> CombinedReward:
        """The sum of the parts without noise; the reward itself where no part has any."""
        return self._with([remove_noise(reward) for reward in self.rewards])

    def for_tokenizer(self, tokenizer: Any) -> CombinedReward:
        """The same sum for responses of a policy with this tokenizer."""
        return self._with([bind_tokenizer(reward, tokenizer) for reward in self.rewards])

    def score_range(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, float] | None:
        """Bounds on the sum; None where a part has none."""
        low = high = 0.0
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            bounds = score_range(reward, [prompt_ids], max_new_tokens)
            if bounds is None:
                return None
            ends = sorted((weight * bounds[0], weight * bounds[1], 0.0))  # 0: where it does not apply
            low += ends[0]
            high += ends[-1]
        return low, high

    def reseed(self, seed: int) -> None:
        """Restarts what is random in the parts, each with a stream of its own."""
        for i, reward in enumerate(self.rewards):
            if hasattr(reward, "reseed"):
                derived = np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1)
                reward.reseed(int(derived[0]))

    def get_state(self) -> list[Any]:
        """The state of what is random in each part, as JSON values; None for a part without."""
        return [reward.get_state() if hasattr(reward, "get_state") else None for reward in self.rewards]

    def set_state(self, state: list[Any]) -> None:
        """Goes on from where `get_state` was called.

        Raises:
            InvalidArgumentError: if this is not such a state.
        """
        if not isinstance(state, list) or len(state) != len(self.rewards):
            raise InvalidArgumentError(f"`state` must come from `CombinedReward.get_state`, got {state!r}.")
        for reward, part in zip(self.rewards, state, strict=True):
            if hasattr(reward, "set_state"):
                reward.set_state(part)


def check_weights(rewards: Sequence[Any], weights: Sequence[float] | None) -> None:
    """Raises `InvalidArgumentError` unless there are rewards, and a finite weight for each (or None)."""
    if not rewards:
        raise InvalidArgumentError("`reward` must be a reward or a non-empty list of them, got an empty list.")
    if weights is None:
        return
    if not isinstance(weights, (list, tuple)) or len(weights) != len(rewards):
        raise InvalidArgumentError(
            f"`reward_weights` must be a list of {len(rewards)} numbers, one a reward, got {weights!r}."
        )
    for i, weight in enumerate(weights):
        check_number(f"reward_weights[{i}]", weight, float("-inf"))
