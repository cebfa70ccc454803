"""What a policy is worth on all responses of a tree.

Shapes: X prompts, R responses of all prompts together, A legal tokens, and N_t the prefixes of t tokens of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TreeSolution(NamedTuple):
    """pi* and V* of every prefix.

    Attributes:
        log_probs: (X, N_t, A) float64 of each level.
        values: (X, N_t) float64 of each level.
    """

    log_probs: list[Tensor]
    values: list[Tensor]


@dataclass(frozen=True, eq=False)
class TreeEvaluation:
    """What a policy is worth, exactly.

    Attributes:
        returns: (X,) float64, J(pi | x) at the task's own `gamma`, `kl_coef` and `dense_kl`, in units of the score.
        kl: (X,) float64, KL(pi || pi_ref) over responses, nats an episode, not discounted.
        entropy: (X,) float64, of the distribution over responses, nats an episode.
        score: (X,) float64, the expected score as paid, not discounted.
        log_probs: (R,) float64 nats, of each response of `Tree.episodes` given its prompt.
        scores: (R,) float64, as paid.
    """

    returns: Tensor
    kl: Tensor
    entropy: Tensor
    score: Tensor
    log_probs: Tensor
    scores: Tensor

    @property
    def value(self) -> float:
        """J(pi), the mean over prompts."""
        return self.returns.mean().item()

    @property
    def metrics(self) -> dict[str, float]:
        """Means over prompts, named as in `lmgym.evaluation`, and `entropy`."""
        per_prompt = {"return": self.returns, "score": self.score, "kl": self.kl, "entropy": self.entropy}
        return {name: x.mean().item() for name, x in per_prompt.items()}

    @property
    def score_distribution(self) -> tuple[Tensor, Tensor]:
        """The K distinct scores, ascending, and the probability of each, the mean over prompts: both (K,) float64."""
        scores, index = self.scores.unique(return_inverse=True)
        probs = self.log_probs.exp() / len(self.returns)
        return scores, torch.zeros_like(scores).index_add(0, index, probs)
