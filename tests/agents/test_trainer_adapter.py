"""Our own agents hold every invariant of `check_trainer`, but for what their objectives forbid."""

from __future__ import annotations

import pytest
from shipped import ON_POLICY

from agents.algorithms.klq import KLQ
from agents.algorithms.pcl import PCL
from agents.algorithms.ppo import PPO
from agents.algorithms.trpo import TRPO
from agents.on_policy import OnPolicyAgent
from agents.trainer_adapter import BY_DESIGN, adapt_agent
from lmgym.testing import check_trainer
from lmgym.testing.invariants import advantages, losses

OWN_UPDATE = {KLQ, PCL, TRPO}  # their step is not down a policy loss
KINDS = [kind for kind in ON_POLICY.values() if kind not in {PPO, *OWN_UPDATE}]


def test_ppo_holds_all_that_it_has() -> None:
    report = check_trainer(adapt_agent(PPO))
    assert report.named("not checked") == ["ranks", "group-axis", "equal-scores"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_breaks_what_its_objective_forbids_and_nothing_else(kind: type[OnPolicyAgent]) -> None:
    own = [invariant.name for invariant in (*losses.INVARIANTS, *advantages.INVARIANTS)]  # models are read alike
    report = check_trainer(adapt_agent(kind), only=own)
    assert set(report.named("by design")) == set(BY_DESIGN.get(kind, {}))
