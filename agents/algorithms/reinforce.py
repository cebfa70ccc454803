"""REINFORCE (Williams 1992; Sutton & Barto 2018, section 13.4), the KL in the reward, with a choice of baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.advantages import leave_one_out, returns_to_go
from agents.batch import Minibatch
from agents.losses import policy_gradient_loss, value_loss
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.update import Loss
from lmgym.episodes import Episodes
from lmgym.ranges import Count, Fraction, NonNegative

Baseline = Literal["none", "mean", "moving_average", "value"]


@dataclass(frozen=True)
class REINFORCEConfig(OnPolicyConfig):
    """REINFORCE's own numbers. More than one step a batch is no longer on-policy."""

    batch_size: Count = 64
    epochs: Count = 1
    minibatches: Count = 1
    lr: NonNegative = 2e-3
    baseline: Baseline = "value"  # what is subtracted from a return
    baseline_decay: Fraction = 0.9  # of the moving average, a batch
    vf_coef: NonNegative = 0.5  # weight of the value loss, for the learned baseline


class REINFORCE(OnPolicyAgent):
    """The gradient of J from whole episodes: sum_t gamma^t (G_t - b_t) grad log pi(a_t|s_t)."""

    Config = REINFORCEConfig
    config: REINFORCEConfig
    carried = ("average",)
    average = 0.0  # of the returns of earlier batches

    @property
    def uses_critic(self) -> bool:
        """With the learned baseline only."""
        return self.config.baseline == "value"

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Returns-to-go less a baseline that does not depend on the episode's own actions from t on: no bias."""
        mask = episodes.response_mask
        kind = self.config.baseline
        returns = returns_to_go(rewards, mask, self.envs.gamma)
        if kind == "value":
            assert episodes.values is not None
            baseline = episodes.values
        elif kind == "mean":
            baseline = leave_one_out(returns, mask)
        else:
            baseline = torch.full_like(returns, self.average if kind == "moving_average" else 0.0)
        decay = self.config.baseline_decay
        self.average = decay * self.average + (1 - decay) * returns[:, 0].mean().item()
        return torch.where(mask, returns - baseline, 0.0), returns

    def loss(self, batch: Minibatch) -> Loss:
        """- mean over episodes of sum_t gamma^t A_t log pi(a_t|s_t), and the squared error of a learned baseline."""
        weights = batch.episode_weights * self.envs.gamma**batch.positions
        policy = policy_gradient_loss(batch.log_probs, batch.advantages, weights)
        metrics = {"train/policy_loss": policy.detach()}
        if not self.uses_critic:
            return policy, metrics
        value = value_loss(batch.values, batch.returns, batch.weights)
        return policy + self.config.vf_coef * value, metrics | {"train/value_loss": value.detach()}
