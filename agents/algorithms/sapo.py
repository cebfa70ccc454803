"""Soft adaptive policy optimisation (Gao et al. 2025): a sigmoid gate where PPO has a clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agents.batch import Minibatch
from agents.groups import ScaledGroupAgent
from agents.losses import approximate_kl, soft_gated_loss
from agents.on_policy_config import ScaledGroupConfig
from agents.update import Loss
from lmgym.ranges import Count, Positive


@dataclass(frozen=True)
class SAPOConfig(ScaledGroupConfig):
    """SAPO's own numbers. The gate closes late: a batch has fewer passes than PPO's."""

    epochs: Count = 2
    temperature: Positive = 1.0  # tau of a positive advantage: the larger, the nearer to ratio 1 the gate closes
    temperature_negative: Positive = 1.05  # tau of a negative one


class SAPO(ScaledGroupAgent):
    """The softly gated surrogate on standardised returns of a group, a mean over responses of means over tokens."""

    Config = SAPOConfig
    config: SAPOConfig

    def loss(self, batch: Minibatch) -> Loss:
        """- mean over responses of 1/n sum_t f(rho_t) A (Gao et al. 2025, section 3)."""
        config = self.config
        ratio = (batch.log_probs, batch.old_log_probs, batch.advantages)
        temperatures = (config.temperature, config.temperature_negative)
        loss = soft_gated_loss(*ratio, batch.episode_weights / batch.lengths, *temperatures).loss
        with torch.no_grad():
            gate = soft_gated_loss(*ratio, batch.weights, *temperatures).gate
        return loss, {
            "train/policy_loss": loss.detach(),
            "train/gate": gate,
            "train/approx_kl": approximate_kl(batch.log_probs, batch.old_log_probs, batch.weights),
        }
