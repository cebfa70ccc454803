"""A policy half as good as the optimum, on tasks where a solver can represent pi*: for data sets of medium quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from agents.algorithms.optimal import prompts_of_all_splits, solve_policy
from agents.fixed import FixedConfig, FixedPolicyAgent
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy
from lmgym.ranges import Range
from lmgym.tasks.base import Task

Share = Annotated[float, Range(0, 1, open_low=True)]

_WIDTH = 12.0  # of the log prices that are tried: e^12 times the price of a nat leaves hardly anything of the gain
_TOLERANCE = 1e-3  # of the share
_MAX_PROMPTS = 16  # that the price is found on; of more, so many that are spread evenly over them


@dataclass(frozen=True)
class MediumConfig(FixedConfig):
    """How good it is."""

    share: Share = 0.5  # of the gain, (J - J_ref) / (V* - J_ref)


class Medium(FixedPolicyAgent):
    """Samples the optimum of the same task at a higher price of a nat, which has a given share of the gain.

    Of all policies with that KL to the reference none has a higher score.

    Raises:
        InvalidArgumentError: if no solver represents the task's pi*, or if there is nothing to gain.
    """

    Config = MediumConfig
    config: MediumConfig

    def make_policy(self) -> Policy:
        """The policy, for the prompts of every split; its share is a mean over some prompts of all."""
        task = self.envs.task
        prompts = prompts_of_all_splits(task)
        price = self.price(task, prompts[:: -(-len(prompts) // _MAX_PROMPTS)])
        return solve_policy(task, prompts, price)[1]

    def price(self, task: Task, prompts: Sequence[str]) -> float:
        """The price of a nat whose optimal policy has the share, on some prompts of a task."""
        best = solve_policy(task, prompts)[0]
        gain = best.value - best.reference
        if gain <= 0:
            raise InvalidArgumentError(f"`task` must have something to gain over the reference, got {task.name!r}.")

        def share(price: float) -> float:
            value = return_of_optimum(lambda k: solve_policy(task, prompts, k)[0].value, price, task.kl_coef)
            return (value - best.reference) / gain

        return find_price(share, task.kl_coef, self.config.share)


def return_of_optimum(value: Callable[[float], float], price: float, kl_coef: float) -> float:
    """J, at `kl_coef`, of the policy that is optimal at another price of a nat.

    value(k) = max over pi of (score - k KL) has the derivative -KL at the policy that has this maximum, so that its
    J = score - kl_coef KL is value(k) - (k - kl_coef) value'(k).

    Args:
        value: V* as a function of the price. price: k. kl_coef: the task's.
    """
    step = 1e-4 * price
    slope = (value(price + step) - value(price - step)) / (2 * step)
    return value(price) - (price - kl_coef) * slope


def find_price(share: Callable[[float], float], kl_coef: float, wanted: float) -> float:
    """The price of a nat whose optimal policy has the `wanted` share of the gain, which falls as the price rises."""
    low = math.log(kl_coef)
    high = low + _WIDTH
    while True:
        middle = (low + high) / 2
        found = share(math.exp(middle))
        if abs(found - wanted) < _TOLERANCE or high - low < _TOLERANCE:
            return math.exp(middle)
        if found > wanted:
            low = middle
        else:
            high = middle
