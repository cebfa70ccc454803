"""The reward-KL frontier: the highest score that a policy can have at so many nats from the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import InvalidArgumentError
from lmgym.tasks import make_task, registered_tasks

_POINTS = 17  # prices of a nat, from a thirtieth of the task's own to thirty times that
_SPAN = 30.0
_MAX_RESPONSES = 40_000  # that are enumerated


@dataclass(frozen=True, eq=False)
class Frontier:
    """What bounds the scores of all policies: at any price b of a nat, score <= V*(b) + b KL.

    Attributes:
        prices: (K,) b. optima: (K,) V*(b), or upper bounds of it.
        exact: whether the prices are so many that their lines are the frontier itself, and not one bound.
    """

    prices: NDArray[np.float64]
    optima: NDArray[np.float64]
    exact: bool

    def score(self, kl: NDArray[np.float64]) -> NDArray[np.float64]:
        """No policy that is `kl` (n,) nats from the reference scores more: the least of all lines."""
        prices = self.prices
        optima = self.optima
        if self.exact:  # V* is smooth in the price
            from scipy.interpolate import CubicSpline

            prices = np.geomspace(self.prices[0], self.prices[-1], 40 * len(self.prices))
            optima = CubicSpline(np.log(self.prices), self.optima)(np.log(prices))
        return (optima[:, None] + prices[:, None] * kl[None, :]).min(0)


@functools.cache
def find_frontier(task: str) -> Frontier | None:
    """The frontier of a registered task on its test prompts; None where nothing bounds it.

    Every V*(b) gives a line that no policy is above. Their least is the frontier, which is concave: it is that of the
    policies pi*(b). Where V* can only be bounded, the one line at the task's own b is what is known.
    """
    registered = registered_tasks().get(task)
    if registered is None or registered.on_hub:
        return None
    made = make_task(task)
    if made.gamma != 1 or made.kl_coef <= 0:
        return None  # the return then discounts score and KL, each in its own way
    stored = made.optima.get("test")
    if stored is not None and not stored.exact:
        return None if stored.upper is None else Frontier(np.array([made.kl_coef]), np.array([stored.upper]), False)
    from lmgym.optimum import solve

    prices = made.kl_coef * np.geomspace(1 / _SPAN, _SPAN, _POINTS)
    try:
        optima = [solve(made, kl_coef=float(price), limit=_MAX_RESPONSES).value for price in prices]
    except InvalidArgumentError:
        return None
    return Frontier(prices, np.array(optima), True)
