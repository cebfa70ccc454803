"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024): a response is judged by its prompt's others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.advantages import group_leave_one_out
from agents.batch import Minibatch
from agents.groups import GroupAgent
from agents.losses import policy_gradient_loss
from agents.on_policy_config import GroupConfig
from agents.update import Loss
from lmgym.ranges import Count, NonNegative


@dataclass(frozen=True)
class RLOOConfig(GroupConfig):
    """RLOO's own numbers. More than one step a batch is no longer on-policy."""

    batch_size: Count = 32
    epochs: Count = 1
    minibatches: Count = 1
    lr: NonNegative = 1e-3


class RLOO(GroupAgent):
    """The whole response is one action; its baseline is the mean return of the group's other responses."""

    Config = RLOOConfig
    config: RLOOConfig

    def compare(self, returns: Tensor) -> Tensor:
        """(B,) R_i - mean of the others' R_j (Ahmadian et al. 2024, section 2.3)."""
        return group_leave_one_out(returns, self.config.group_size)

    def loss(self, batch: Minibatch) -> Loss:
        """- mean over episodes of A_i log pi(y_i|x)."""
        policy = policy_gradient_loss(batch.log_probs, batch.advantages, batch.episode_weights)
        return policy, {"train/policy_loss": policy.detach()}
