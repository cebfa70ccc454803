"""What every solver answers with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy
from lmgym.rewards.base import RewardFunction
from lmgym.tasks.base import StoredOptimum, Task


@dataclass(frozen=True, eq=False)
class Optimum:
    """What is known of V*, the best return that any policy can have, and of the reference's own return.

    All in units of the score, of the discounted return with both halves of the KL (design, section 1).

    Attributes:
        method: what computed it.
        values: (X,) float64, V*(x) of each prompt of the split, in its order; the middle of the bounds where not exact.
        references: (X,) float64, J(pi_ref | x): the reference pays no KL, so its expected discounted score.
        lower: what V*, the mean over prompts, is at least. upper: what it is at most; inf where nothing is known.
            Where they come from samples they are the outer ends of 95 % intervals.
        exact: whether `values` are V* itself, up to rounding.
        policy: pi*, where it can be represented; else None.
    """

    method: str
    values: Tensor
    references: Tensor
    lower: float
    upper: float
    exact: bool
    policy: Policy | None = None

    @property
    def value(self) -> float:
        """V*, the mean over prompts."""
        return self.values.mean().item()

    @property
    def reference(self) -> float:
        """J(pi_ref), the mean over prompts."""
        return self.references.mean().item()

    def stored(self) -> StoredOptimum:
        """Its numbers alone."""
        upper = self.upper if math.isfinite(self.upper) else None
        return StoredOptimum(self.method, self.value, self.lower, upper, self.reference)

    @classmethod
    def solved(cls, method: str, values: Tensor, references: Tensor, policy: Policy | None = None) -> Optimum:
        """An exact answer: both bounds are the value."""
        value = values.mean().item()
        return cls(method, values, references, value, value, True, policy)


def expected_reward(task: Task) -> RewardFunction:
    """What the task pays on average: a noisy reward without its noise, any other as it is."""
    reward = task.reward_function("cpu")
    return getattr(reward, "expected", reward)


def check_solvable(task: Task) -> None:
    """Raises `InvalidArgumentError` where there is no regularised optimum."""
    if task.kl_coef <= 0:
        raise InvalidArgumentError(
            f"`kl_coef` must be > 0 for the regularised optimum, got {task.kl_coef!r}: at 0 it is the largest score."
        )
