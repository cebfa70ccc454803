"""Several reward models as one reward: the mean of their scores, the lowest, or how far they disagree.

A directory with an `ensemble.json` names the members, each a directory of its own beside or below it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.files import read_json
from lmgym.rewards.base import RewardFunction, bind_tokenizer, scores_or_none
from lmgym.rewards.classifier import load_reward_model

ENSEMBLE_FILE = "ensemble.json"
SCORES = ("mean", "minimum", "spread")


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
        """One score an episode."""
        scores = np.array([scores_or_none(reward, prompts, completions, columns) for reward in self.rewards], float)
        if self.score == "minimum":
            return scores.min(0).tolist()
        return (scores.std(0, ddof=1) if self.score == "spread" else scores.mean(0)).tolist()

    def for_tokenizer(self, tokenizer: Any) -> EnsembleReward:
        """The same for responses of a policy with this tokenizer."""
        return EnsembleReward([bind_tokenizer(reward, tokenizer) for reward in self.rewards], self.score)


def is_ensemble(name: object) -> bool:
    """Whether a name is that of a directory with several reward models."""
    return isinstance(name, (str, os.PathLike)) and (Path(name) / ENSEMBLE_FILE).is_file()


def load_ensemble(name: str, device: str = "auto") -> EnsembleReward:
    """The reward of a directory with several reward models.

    Raises:
        LmGymError: for a damaged file, and for members that cannot be loaded.
    """
    path = Path(name) / ENSEMBLE_FILE
    content = read_json(path)
    members = content.get("members")
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise InvalidArgumentError(f"`members` in {path} must be a list of directories, got {members!r}.")
    paths = [os.path.join(name, member) for member in members]
    return EnsembleReward([load_reward_model(member, device) for member in paths], content.get("score", "mean"))
