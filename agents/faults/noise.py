"""Scores with noise: what is learned from is the score with a Gaussian error, drawn anew for each episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from agents.faults.fault import Fault
from agents.seeds import REWARD_NOISE, torch_generator
from lmgym.episodes import Episodes


class RewardNoise(Fault):
    """Adds independent noise of mean 0 to the scores that are learned from; the optimum stays as it is.

    Args:
        sigma: its standard deviation, in units of the score. seed: of the noise.
    """

    key = "reward_noise"

    def __init__(self, sigma: float, seed: int = 0) -> None:
        super().__init__()
        self._sigma = sigma
        self._generator = torch_generator(seed, REWARD_NOISE)

    def tell(self, episodes: Episodes) -> Episodes:
        noise = torch.randn(len(episodes), generator=self._generator).to(episodes.scores.device)
        scores = episodes.scores + self._sigma * noise
        self.metrics = {"train/learned_score": scores.mean().item()}
        return replace(episodes, scores=scores)

    def state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"])
