"""A reward model that a task reads in a way of its own: as a probability, say, or in another form of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmgym.models.names import check_model_name
from lmgym.rewards.base import RewardFunction

if TYPE_CHECKING:
    from lmgym.rewards.classifier import ClassifierReward


@dataclass(frozen=True)
class ModelReward:
    """The reward that a function makes of a named reward model; loads nothing before it is asked to.

    Where another model is named in its place (`env.reward=DIRECTORY`), that one is read in the same way.

    Attributes:
        model: directory or hub name of a sequence-classification model.
        read: makes the reward function of the loaded model.
    """

    model: str
    read: Callable[[ClassifierReward], RewardFunction]

    def __post_init__(self) -> None:
        check_model_name("reward", self.model)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]:
        """One score an episode, by the model loaded where it runs best."""
        return self.load("auto")(prompts, completions, **columns)

    def load(self, device: str) -> RewardFunction:
        """The reward function, on a device."""
        from lmgym.rewards.classifier import load_reward_model

        return self.read(load_reward_model(self.model, device))

    def of_model(self, name: str) -> ModelReward:
        """The same reading of another model."""
        return replace(self, model=name)
