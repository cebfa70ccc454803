"""The multiplier of a KL that is paid late: against its equation, and against a bisection over all prompts at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmgym.optimum.lengths import discounts_by_length, length_multiplier

BY_LENGTH = torch.tensor(
    [[-3.0, 1.0, 5.0], [3.0, -torch.inf, 8.0], [-2.0, -9.0, -1.0], [40.0, 0.0, 0.0]], dtype=torch.float64
)


def bisect(by_length: Tensor, discounts: Tensor, kl_coef: float) -> Tensor:
    """(X,) roots of (X, T) log-weights, by a fixed number of halvings."""
    edge = kl_coef * (by_length - 1).logsumexp(1)
    low = edge.clamp(max=0)
    high = edge.clamp(min=0)
    for _ in range(200):  # enough for a root as small as the least discount
        middle = (low + high) / 2
        above = (by_length - 1 - middle.unsqueeze(1) / (kl_coef * discounts)).logsumexp(1) > 0
        low = torch.where(above, middle, low)
        high = torch.where(above, high, middle)
    return (low + high) / 2


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.1, 1e-8, 0.0])
def test_the_multiplier_agrees_with_a_bisection_over_all_prompts(gamma: float) -> None:
    discounts = discounts_by_length(gamma, 3)
    found = [length_multiplier(row, discounts, 0.3) for row in BY_LENGTH]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), bisect(BY_LENGTH, discounts, 0.3), rtol=1e-12, atol=0
    )
    for row, root in zip(BY_LENGTH.tolist(), found, strict=True):
        terms = [x - 1 - root / (0.3 * d) for x, d in zip(row, discounts.tolist(), strict=True)]
        assert sum(math.exp(min(x, 50)) for x in terms) == pytest.approx(1, abs=1e-8)


def test_the_multiplier_is_the_root_at_any_scale() -> None:
    discounts = discounts_by_length(0.3, 5)
    for shift in (-40.0, -1.0, 0.0, 3.0, 200.0):
        log_weights = shift + torch.tensor([0.5, -torch.inf, 1.0, -3.0, 0.2], dtype=torch.float64)
        lam = length_multiplier(log_weights, discounts, 0.2)
        total = (log_weights - 1 - lam / (0.2 * discounts)).logsumexp(0)
        assert total.item() == pytest.approx(0, abs=1e-9)
        assert lam * float((log_weights - 1).logsumexp(0)) > 0


def test_no_discount_is_0() -> None:
    assert discounts_by_length(0.0, 3).tolist() == [1.0, 1e-30, 1e-30]
