"""REINFORCE, and RLOO with it, where the KL is paid late: what their update leaves out of the gradient of J."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyProblem
from directions import DISCOUNT, UNBIASED, agent_of, direction, gradient, late_term, ways_of

from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.on_policy import OnPolicyAgent
from lmgym.optimum.tree import Tree

CASES = [pair for pair in UNBIASED if pair[0] in (REINFORCE, RLOO)]


@pytest.mark.parametrize("gamma", [1.0, DISCOUNT])
@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_a_late_kl_at_a_discount_has_a_derivative_that_is_missed(
    kind: type[OnPolicyAgent], config: dict[str, Any], gamma: float
) -> None:
    tree = Tree.of(TinyProblem(gamma=gamma, dense_kl=False).task, "train")
    agent = agent_of(kind, tree.task, **config)
    found = direction(agent, tree, ways_of(agent, tree))
    right = gradient(agent, tree)
    missed = late_term(agent, tree)
    size = right.norm().item()
    torch.testing.assert_close(found + missed, right, rtol=0, atol=1e-5 * size)
    assert missed.norm() > 0.1 * size if gamma < 1 else missed.norm() < 1e-5 * size
