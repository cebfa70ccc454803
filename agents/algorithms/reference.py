"""The reference: J_ref, the zero of the normalised return."""

from __future__ import annotations

from agents.fixed import FixedPolicyAgent
from lmgym.models.policy import CausalPolicy, Policy


class Reference(FixedPolicyAgent):
    """Samples pi_ref: KL 0, so that its return is its score."""

    def make_policy(self) -> Policy:
        """The reference, pi_ref."""
        return CausalPolicy(self.envs.engine.lm)
