"""The optimum where the whole KL is paid late, with a last reward that is discounted.

Shapes: T horizon.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmgym.tasks.base import Task

LEAST_DISCOUNT = 1e-30  # a smaller discount counts as this: it changes no return, and pi* stays unique at gamma = 0


def discounts_by_length(gamma: float, horizon: int) -> Tensor:
    """(T,) float64: gamma^(n-1), the discount of the last reward of a response of n = 1 ... T tokens."""
    return (gamma ** torch.arange(horizon, dtype=torch.float64)).clamp(min=LEAST_DISCOUNT)


def is_late(task: Task) -> bool:
    """Whether the KL is paid with a last reward that is discounted. Then no backup over single steps gives V*."""
    return task.gamma < 1 and not task.dense_kl


def length_multiplier(log_weights: Tensor, discounts: Tensor, kl_coef: float) -> float:
    """The root lam of sum_n Z_n exp(-1 - lam / (b d_n)) = 1, by bisection to the last bit.

    The sum falls with lam, at least by the factor exp(-lam / b), as d <= 1. So the root is between 0 and
    b log(sum at 0).

    Args:
        log_weights: (T,) log Z_n, -inf for none. discounts: (T,) d_n in (0, 1]. kl_coef: b.

    Returns:
        lam, in units of the score.
    """

    def excess(lam: float) -> float:
        return float((log_weights - 1 - lam / (kl_coef * discounts)).logsumexp(0))

    edge = kl_coef * excess(0.0)
    low = min(edge, 0.0)
    high = max(edge, 0.0)
    while low < (middle := (low + high) / 2) < high:
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return high
