"""Advantage actor-critic (Mnih et al. 2016, without the asynchrony) with the KL penalty in the reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.batch import Minibatch
from agents.losses import policy_gradient_loss, value_loss
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.update import Loss
from lmgym.episodes import Episodes
from lmgym.ranges import Count, Fraction, NonNegative


@dataclass(frozen=True)
class A2CConfig(OnPolicyConfig):
    """A2C's own numbers. More than one step a batch is no longer on-policy."""

    batch_size: Count = 64
    epochs: Count = 1
    minibatches: Count = 1
    lr: NonNegative = 2e-3
    gae_lambda: Fraction = 0.95  # 0 is one-step TD, 1 is Monte Carlo
    vf_coef: NonNegative = 0.5  # weight of the value loss
    entropy_coef: NonNegative = 0.0  # weight of an entropy bonus


class A2C(OnPolicyAgent):
    """One step a batch along log pi weighted with GAE advantages, and a value loss."""

    Config = A2CConfig
    config: A2CConfig

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """GAE over the tokens of each episode; one that was truncated is bootstrapped with V of its last state."""
        return self.gae(episodes, rewards, self.config.gae_lambda)

    def loss(self, batch: Minibatch) -> Loss:
        """- A log pi + vf_coef * L_value - entropy_coef * entropy, means over tokens."""
        policy = policy_gradient_loss(batch.log_probs, batch.advantages, batch.weights)
        value = value_loss(batch.values, batch.returns, batch.weights)
        loss = policy + self.config.vf_coef * value
        if self.config.entropy_coef:
            loss = loss - self.config.entropy_coef * (batch.weights * batch.entropies).sum()
        return loss, {"train/policy_loss": policy.detach(), "train/value_loss": value.detach()}
