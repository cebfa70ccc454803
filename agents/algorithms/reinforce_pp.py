"""REINFORCE++ (Hu et al. 2025): returns-to-go normalised over the batch, with and without the mean of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.advantages import group_baseline, returns_to_go, whiten
from agents.batch import Minibatch
from agents.losses import clipped_policy_loss
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import GroupConfig
from agents.update import Loss
from lmgym.episodes import Episodes
from lmgym.kl import discounted_return
from lmgym.ranges import Count, Positive


@dataclass(frozen=True)
class REINFORCEPlusPlusConfig(GroupConfig):
    """REINFORCE++'s own numbers."""

    group_size: Count = 1  # responses to each prompt; above 1 the mean return of a group is taken off first
    clip_range: Positive = 0.2  # of the ratio


class REINFORCEPlusPlus(OnPolicyAgent):
    """The clipped surrogate on returns-to-go that are whitened over the batch, with the KL in the reward."""

    Config = REINFORCEPlusPlusConfig
    config: REINFORCEPlusPlusConfig

    @property
    def uses_critic(self) -> bool:
        """False: the baseline is the mean of the batch, or of the group."""
        return False

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Returns-to-go, less the mean return of a group if there is one, whitened over the batch."""
        mask = episodes.response_mask
        returns = returns_to_go(rewards, mask, self.envs.gamma)
        if self.config.group_size > 1:
            totals = discounted_return(rewards, self.envs.gamma)
            returns = group_baseline(returns, totals, self.config.group_size)
        return whiten(returns, mask), torch.zeros_like(rewards)

    def loss(self, batch: Minibatch) -> Loss:
        """L_clip, a mean over tokens."""
        policy = clipped_policy_loss(
            batch.log_probs, batch.old_log_probs, batch.advantages, batch.weights, self.config.clip_range
        )
        return policy.loss, policy.metrics
