"""Proximal policy optimisation (Schulman et al. 2017) with the KL penalty in the reward (Ziegler et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.advantages import whiten
from agents.base import Minibatch, OnPolicyAgent, OnPolicyConfig
from agents.losses import clipped_policy_loss, clipped_value_loss
from lmgym.episodes import Episodes
from lmgym.errors import check_number
from lmgym.kl import entropy


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """PPO's own numbers."""

    gae_lambda: float = 0.95  # 0 is one-step TD, 1 is Monte Carlo
    clip_range: float = 0.2  # of the ratio
    clip_range_value: float | None = 0.2  # of the value around its old one; null does not clip
    vf_coef: float = 0.5  # weight of the value loss
    entropy_coef: float = 0.0  # weight of an entropy bonus
    whiten_advantages: bool = True  # over the whole batch, to mean 0 and standard deviation 1
    target_kl: float | None = None  # nats a token between the old policy and the new: past 1.5 times it a batch is left

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gae_lambda", self.gae_lambda, 0, 1)
        check_number("vf_coef", self.vf_coef, 0)
        for name in ("clip_range", "clip_range_value", "target_kl"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, open_low=True)


class PPO(OnPolicyAgent):
    """The clipped surrogate on GAE advantages, with a clipped value loss."""

    Config = PPOConfig
    config: PPOConfig

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """GAE over the tokens of each episode; one that was truncated is bootstrapped with V of its last state."""
        advantages, returns = self.gae(episodes, rewards, self.config.gae_lambda)
        return whiten(advantages, episodes.response_mask) if self.config.whiten_advantages else advantages, returns

    def loss(self, batch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """L_clip + vf_coef * L_value - entropy_coef * entropy (Schulman et al. 2017, eq. 9)."""
        config = self.config
        policy = clipped_policy_loss(
            batch.log_probs, batch.old_log_probs, batch.advantages, batch.weights, config.clip_range
        )
        value = clipped_value_loss(
            batch.values, batch.old_values, batch.returns, batch.weights, config.clip_range_value
        )
        loss = policy.loss + config.vf_coef * value
        if config.entropy_coef:
            loss = loss - config.entropy_coef * (batch.weights * entropy(batch.log_law)).sum()
        return loss, {
            "train/policy_loss": policy.loss.detach(),
            "train/value_loss": value.detach(),
            "train/clip_fraction": policy.clip_fraction,
            "train/approx_kl": policy.approx_kl,
        }

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Whether the policy has moved past 1.5 times `target_kl` on this batch (as in SB3)."""
        return self.config.target_kl is not None and metrics["train/approx_kl"] > 1.5 * self.config.target_kl
