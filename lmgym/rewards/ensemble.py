"""Several reward models as one reward: the mean of their scores, the lowest, or how far they disagree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.rewards.base import RewardFunction, bind_tokenizer, score
from lmgym.rewards.classifier import load_reward_model
from lmgym.rewards.members import SCORES, read_members


class EnsembleReward:
    """One score from those of several rewards of the same kind.

    Args:
        rewards: the members, two at least.
        score: "mean"; "minimum", the score of the member that likes a response least (Coste et al. 2023); or "spread",
            the standard deviation of their scores, which is high where they disagree.

    Raises:
        InvalidArgumentError: for fewer than two members.
        UnknownNameError: for another score.
    """

    reads_plain_text = True  # it passes on what it is given

    def __init__(self, rewards: Sequence[RewardFunction], score: str = "mean") -> None:
        if len(rewards) < 2:
            raise InvalidArgumentError(f"`rewards` must be two at least, got {len(rewards)}.")
        check_choice("score", score, SCORES)
        self.rewards = tuple(rewards)
        self.score = score

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode.

        Raises:
            RewardError: if a member breaks its contract.
        """
        scores = np.array([score(reward, prompts, completions, **columns) for reward in self.rewards])
        if self.score == "minimum":
            return scores.min(0).tolist()
        if self.score == "spread":
            return scores.std(0, ddof=1).tolist()
        return scores.mean(0).tolist()

    def for_tokenizer(self, tokenizer: Any) -> EnsembleReward:
        """The same for responses of a policy with this tokenizer."""
        return EnsembleReward([bind_tokenizer(reward, tokenizer) for reward in self.rewards], self.score)


def load_ensemble(name: str | os.PathLike[str], device: str = "auto") -> EnsembleReward:
    """The reward of a directory with several reward models (`lmgym.rewards.members`).

    Raises:
        LmGymError: for a damaged file, and for members that cannot be loaded.
    """
    members = read_members(name)
    return EnsembleReward([load_reward_model(path, device) for path in members.directories], members.score)
