"""Our own agents hold every invariant of `check_trainer`, but for what their objectives forbid."""

from __future__ import annotations

import pytest

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.on_policy import OnPolicyAgent
from agents.trainer_adapter import BY_DESIGN, adapt_agent
from lmgym.testing import check_trainer
from lmgym.testing.invariants import advantages, losses


def test_ppo_holds_all_that_it_has() -> None:
    report = check_trainer(adapt_agent(PPO))
    assert report.named("not checked") == ["ranks", "group-axis", "equal-scores"]


@pytest.mark.parametrize("kind", [A2C, REINFORCE, RLOO, GRPO])
def test_an_agent_breaks_what_its_objective_forbids_and_nothing_else(kind: type[OnPolicyAgent]) -> None:
    own = [invariant.name for invariant in (*losses.INVARIANTS, *advantages.INVARIANTS)]  # models are read alike
    report = check_trainer(adapt_agent(kind), only=own)
    assert report.named("by design") == list(BY_DESIGN[kind])


def test_dr_grpo_follows_the_gradient_of_the_score() -> None:
    report = check_trainer(adapt_agent(GRPO, length_mean=False, scale_by_std=False), only=["policy-gradient"])
    assert report.named("ok") == ["policy-gradient"]
