"""What the MDP gives: for one step, for whole responses, and for episodes that have ended.

Shapes: N rows, T response columns, B episodes, n episodes that ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcomes:
    """How n episodes ended.

    Attributes:
        scores: of the rewards, a missing-EOS penalty already taken off.
        gold_scores: of the gold reward, or None where the task has none.
        finish_reasons: "eos" or "length" each.
        prompts: their texts. responses: their texts.
        discounted_returns: of the env's own half of the reward; empty until the rewards of the steps are known.
    """

    scores: list[float]
    gold_scores: list[float] | None
    finish_reasons: list[str]
    prompts: list[str]
    responses: list[str]
    discounted_returns: list[float] = field(default_factory=list)

    def columns(self) -> dict[str, list[Any]]:
        """The values that `info` has for them, by its keys."""
        gold = {} if self.gold_scores is None else {"gold_score": self.gold_scores}
        return {
            "score": self.scores,
            **gold,
            "finish_reason": self.finish_reasons,
            "prompt": self.prompts,
            "response": self.responses,
            "discounted_return": self.discounted_returns,
        }


@dataclass(frozen=True)
class Transition:
    """What one step of the MDP gave. Rows that were not live are 0 or False throughout.

    Attributes:
        rewards: (N,) the env's own half of the reward (docs/mdp.md).
        ref_log_probs: (N,) nats, log pi_ref of the tokens that this step's rewards charge; None where there are none.
        terminated: (N,). truncated: (N,).
        ended: rows (n,) whose episode ended, in order.
        outcomes: of these n episodes; None where none ended.
    """

    rewards: Floats
    ref_log_probs: Floats | None
    terminated: Bools
    truncated: Bools
    ended: Ints
    outcomes: Outcomes | None


@dataclass(frozen=True)
class Replay:
    """What stepping whole responses would have given, from one pass.

    Attributes:
        response_mask: (B, T) bool, True up to and including the end.
        rewards: (B, T) the env's own half of the reward, 0 off the mask.
        ref_log_probs: (B, T) nats, 0 off the mask and at `kl_coef=0`.
        terminated: (B,). truncated: (B,).
        outcomes: of the B episodes.
    """

    response_mask: Bools
    rewards: Floats
    ref_log_probs: Floats
    terminated: Bools
    truncated: Bools
    outcomes: Outcomes
