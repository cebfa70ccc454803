"""A reward that is biased by length: every token adds to the score that is learned from, and to no grade."""

from __future__ import annotations

from dataclasses import replace

from agents.faults.fault import Fault
from lmgym.episodes import Episodes


class LengthBias(Fault):
    """Adds c times the number of tokens, EOS included, to the scores that are learned from.

    Args:
        per_token: c, in units of the score; of either sign.
    """

    key = "length_bias"

    def __init__(self, per_token: float) -> None:
        super().__init__()
        self._per_token = per_token

    def tell(self, episodes: Episodes) -> Episodes:
        scores = episodes.scores + self._per_token * episodes.lengths
        self.metrics = {"train/learned_score": scores.mean().item()}
        return replace(episodes, scores=scores)
