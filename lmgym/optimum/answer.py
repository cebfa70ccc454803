"""The answer of every solver, and what a task must have to be solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy
from lmgym.rewards.base import STOCHASTIC, RewardFunction, remove_noise, scores_agree
from lmgym.tasks.base import Task
from lmgym.tasks.stored import StoredOptimum


@dataclass(frozen=True, eq=False)
class Optimum:
    """What is known of V*, the best return that any policy can have, and of the reference's own return.

    All numbers are in units of the score, and are of the discounted return with both halves of the KL (docs/mdp.md).

    Attributes:
        method: how it was computed.
        values: (X,) float64, V*(x) of each prompt of the split, in its order; the middle of the bounds if not exact.
        references: (X,) float64, J(pi_ref | x), the expected discounted score: the reference pays no KL.
        lower: what V*, the mean over prompts, is at least. upper: what it is at most; inf where nothing is known.
            Bounds from samples are the outer ends of 95 % intervals.
        exact: whether `values` are V* itself, up to rounding.
        policy: pi*, if it can be represented; else None.
        reference_half_width: half of the 95 % interval of `reference`, over the sampling; 0 if it is exact.
        assumption: what the upper bound assumes and what that may cost, in words; empty if it assumes nothing.
    """

    method: str
    values: Tensor
    references: Tensor
    lower: float
    upper: float
    exact: bool
    policy: Policy | None = None
    reference_half_width: float = 0.0
    assumption: str = ""

    def __repr__(self) -> str:
        return repr(self.stored()).replace("StoredOptimum(", "Optimum(", 1)

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
        return StoredOptimum(
            self.method,
            self.value,
            self.lower,
            upper,
            self.reference,
            self.reference_half_width,
            self.assumption,
        )

    @classmethod
    def solved(cls, method: str, values: Tensor, references: Tensor, policy: Policy | None = None) -> Optimum:
        """An exact answer: both bounds are the value."""
        value = values.mean().item()
        return cls(method, values, references, value, value, True, policy)


def expected_reward(task: Task) -> RewardFunction:
    """The task's reward without its noise; a reward that has none is as it is."""
    return remove_noise(task.reward_function("cpu"))


def check_repeatable(first: Sequence[float], second: Sequence[float]) -> None:
    """Raises `InvalidArgumentError` if two calls of a reward gave different scores: one call does not show V* then."""
    if not scores_agree(first, second):
        raise InvalidArgumentError(f"`reward` must have no noise for the optimum to be found: {STOCHASTIC}.")


def check_solvable(task: Task) -> None:
    """Raises `InvalidArgumentError` at `kl_coef=0`, where there is no regularised optimum."""
    if task.kl_coef <= 0:
        raise InvalidArgumentError(
            f"`kl_coef` must be > 0 for the regularised optimum, got {task.kl_coef!r}: at 0 it is the largest score."
        )


def check_bounded(task: Task) -> None:
    """Raises `InvalidArgumentError` unless V* is kl_coef log E exp(score / kl_coef): kl_coef > 0 and gamma = 1."""
    check_solvable(task)
    if task.gamma != 1:
        raise InvalidArgumentError(f"`gamma` must be 1 for these bounds on the optimum, got {task.gamma!r}.")
