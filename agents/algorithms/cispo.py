"""CISPO (MiniMax 2025): the weight of a token's gradient is clipped, never the gradient itself."""

from __future__ import annotations

from dataclasses import dataclass

from agents.batch import Minibatch
from agents.groups import ScaledGroupAgent
from agents.losses import clipped_weight_loss
from agents.on_policy_config import ScaledGroupConfig
from agents.update import Loss
from lmgym.ranges import Count, Positive, PositiveFraction


@dataclass(frozen=True)
class CISPOConfig(ScaledGroupConfig):
    """CISPO's own numbers. Nothing stops a token that has moved far: a batch has fewer passes than PPO's."""

    epochs: Count = 2
    clip_range_high: Positive = 0.28  # the weight of a token is at most 1 plus this
    clip_range: PositiveFraction | None = None  # and at least 1 less this; null leaves it free below


class CISPO(ScaledGroupAgent):
    """The policy gradient, weighted with clipped ratios, on standardised returns of a group, a mean over tokens."""

    Config = CISPOConfig
    config: CISPOConfig

    def loss(self, batch: Minibatch) -> Loss:
        """- mean over tokens of sg(clip(rho)) A log pi (MiniMax 2025, eqs. 4 and 5)."""
        policy = clipped_weight_loss(
            batch.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.weights,
            self.config.clip_range_high,
            self.config.clip_range,
        )
        return policy.loss, policy.metrics
