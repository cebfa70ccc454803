"""Group-relative policy optimisation (Shao et al. 2024), with switches for what Dr. GRPO (Liu et al. 2025) removes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agents.advantages import group_standardised
from agents.batch import Batch, Minibatch
from agents.groups import GroupAgent
from agents.losses import KLEstimator, clipped_policy_loss, kl_estimate, kl_to_go
from agents.on_policy_config import GroupConfig, GroupSize
from agents.policies.actor_critic import read_logits
from agents.update import Loss
from lmgym.episodes import Episodes
from lmgym.kl import token_rewards
from lmgym.ranges import Positive


@dataclass(frozen=True)
class GRPOConfig(GroupConfig):
    """GRPO's own numbers."""

    group_size: GroupSize = 8
    clip_range: Positive = 0.2  # of the ratio
    kl_estimator: KLEstimator = "k3"  # of the KL in the loss, token by token
    scale_by_std: bool = True  # divide a group's advantages by their standard deviation
    length_mean: bool = True  # mean over a response's tokens; else their sum over the horizon

    @property
    def reads_reference(self) -> bool:
        return self.kl_estimator == "exact"


class GRPO(GroupAgent):
    """The clipped surrogate on standardised scores of a group, with the KL in the loss instead of the reward."""

    Config = GRPOConfig
    config: GRPOConfig

    def rewards(self, episodes: Episodes) -> Tensor:
        """The score alone, at the end."""
        return token_rewards(episodes, 0.0)

    def compare(self, returns: Tensor) -> Tensor:
        """(B,) (R_i - mean R) / std R of the group (Shao et al. 2024, section 4.1.2)."""
        return group_standardised(returns, self.config.group_size, scale=self.config.scale_by_std)

    def read(self, part: Batch, total: Tensor, count: int, *, backward: int = 0) -> Minibatch:
        """For the exact KL, reads the reference too: one more forward, without a gradient."""
        minibatch = super().read(part, total, count, backward=backward)
        if not self.config.reads_reference or self.envs.kl_coef == 0:
            return minibatch
        self.tokens.read(part.episodes)
        with torch.no_grad():
            return replace(minibatch, ref_logits=read_logits(self.envs.engine.lm, part.episodes))

    def token_kls(self, batch: Minibatch) -> Tensor:
        """(n,) what each token adds to the KL in the loss."""
        kind = self.config.kl_estimator
        if kind == "k2_to_go":
            return kl_to_go(batch.log_probs, batch.ref_log_probs, batch.positions, batch.lengths)
        return kl_estimate(kind, batch.log_probs, batch.ref_log_probs, batch.logits, batch.ref_logits)

    def loss(self, batch: Minibatch) -> Loss:
        """L_clip + kl_coef * KL(pi || pi_ref), means over episodes (Shao et al. 2024, eq. 3, negated)."""
        config = self.config
        ratio = (batch.log_probs, batch.old_log_probs, batch.advantages)
        weights = batch.episode_weights / (batch.lengths if config.length_mean else self.envs.engine.horizon)
        loss = clipped_policy_loss(*ratio, weights, config.clip_range).loss
        metrics = {"train/policy_loss": loss.detach()}
        if self.envs.kl_coef > 0:  # without a price the reference is never asked
            kl = (weights * self.token_kls(batch)).sum()
            loss = loss + self.kl.value * kl
            metrics["train/kl_loss"] = kl.detach()
        with torch.no_grad():
            tokens = clipped_policy_loss(*ratio, batch.weights, config.clip_range)
        return loss, metrics | {"train/clip_fraction": tokens.clip_fraction, "train/approx_kl": tokens.approx_kl}
