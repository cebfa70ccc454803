"""Dr. GRPO (Liu et al. 2025): GRPO without the division by the deviation and by the length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.advantages import group_standardised
from agents.batch import Minibatch
from agents.groups import GroupAgent
from agents.losses import clipped_policy_loss
from agents.on_policy_config import GroupConfig, GroupSize
from agents.update import Loss
from lmgym.ranges import Positive


@dataclass(frozen=True)
class DrGRPOConfig(GroupConfig):
    """Dr. GRPO's own numbers."""

    group_size: GroupSize = 8
    clip_range: Positive = 0.2  # of the ratio


class DrGRPO(GroupAgent):
    """The clipped surrogate on returns less the mean of their group, summed over tokens, with the KL in the reward."""

    Config = DrGRPOConfig
    config: DrGRPOConfig

    def compare(self, returns: Tensor) -> Tensor:
        """(B,) R_i - mean R of the group (Liu et al. 2025, section 3.2)."""
        return group_standardised(returns, self.config.group_size, scale=False)

    def loss(self, batch: Minibatch) -> Loss:
        """L_clip: means over episodes of sums over tokens, divided by the horizon, a constant."""
        config = self.config
        ratio = (batch.log_probs, batch.old_log_probs, batch.advantages)
        loss = clipped_policy_loss(*ratio, batch.episode_weights / self.envs.engine.horizon, config.clip_range).loss
        with torch.no_grad():
            tokens = clipped_policy_loss(*ratio, batch.weights, config.clip_range)
        return loss, {
            "train/policy_loss": loss.detach(),
            "train/clip_fraction": tokens.clip_fraction,
            "train/approx_kl": tokens.approx_kl,
        }
