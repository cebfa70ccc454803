"""KL-regularised Q-learning (Brown et al. 2025): soft Bellman regression of Q around the reference.

Policy and critic together are one action-value function, Q(s, a) = V(s) + kl_coef * log(pi(a|s) / pi_ref(a|s)). As pi
is normalised, V(s) = kl_coef * log sum_a pi_ref(a|s) exp(Q(s, a) / kl_coef): V is the soft value of this Q, and pi its
Boltzmann policy around the reference, by construction. At the optimum they are Q*, V* and pi*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.batch import Minibatch
from agents.losses import value_loss
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.update import Loss
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import token_rewards
from lmgym.models.sampling import Sampler
from lmgym.ranges import Fraction, NonNegative


@dataclass(frozen=True)
class KLQConfig(OnPolicyConfig):
    """KLQ's own numbers."""

    lr: NonNegative = 1e-3
    td_lambda: Fraction = 0.95  # of the lambda-return; 0 is one-step soft Q-learning, 1 is Monte Carlo

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance != "none":
            raise InvalidArgumentError(
                f"`importance` must be 'none' for a loss without advantages, got {self.importance!r}."
            )


class KLQ(OnPolicyAgent):
    """Squared error of Q at the chosen tokens to its lambda-returns, and nothing else."""

    Config = KLQConfig
    config: KLQConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: KLQConfig, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        if envs.kl_coef <= 0:
            raise InvalidArgumentError(
                f"`kl_coef` must be > 0 for an action value to be a log-ratio, got {envs.kl_coef!r}."
            )
        if envs.gamma < 1 and not envs.task.dense_kl:
            raise InvalidArgumentError(
                "`dense_kl` must be True below gamma = 1, got False: a KL that is charged late is of no state's value."
            )
        super().__init__(envs, config, seed=seed, sampler=sampler)

    def rewards(self, episodes: Episodes) -> Tensor:
        """The KL at the token where it arises, even if the task charges it at the end: Q depends on the state alone."""
        return token_rewards(episodes, self.kl.value)

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """The lambda-return of Q: Q(s_t, a_t) + sum_k (gamma lambda)^k delta_{t+k}.

        delta_t = score_t + gamma V(s_{t+1}) - Q(s_t, a_t), which is the TD error of V under the reward with both halves
        of the KL: the sum is the GAE of that reward.
        """
        advantages, returns = self.gae(episodes, rewards, self.config.td_lambda)
        bonus = self.kl.value * (episodes.log_probs - episodes.ref_log_probs)
        return advantages, torch.where(episodes.response_mask, returns + bonus, 0.0)

    def estimates(self, episodes: Episodes) -> Tensor:
        """Q(s_t, a_t), whose targets the lambda-returns are."""
        return super().estimates(episodes) + self.kl.value * (episodes.log_probs - episodes.ref_log_probs)

    def loss(self, batch: Minibatch) -> Loss:
        """Half the mean squared error of Q over tokens, whose gradient reaches V and pi alike.

        V is held back to kl_coef times its own gradient, the share that log pi has by itself: else, on weights that
        both use, V would close every error before pi has moved. No fixed point is moved by that. A token that left the
        support of a truncated distribution has no Q, and adds nothing.
        """
        gone = batch.log_probs == -torch.inf
        held = batch.values.detach()
        log_probs = batch.log_probs.masked_fill(gone, 0.0)
        q = held + self.kl.value * (batch.values - held + log_probs - batch.ref_log_probs)
        loss = value_loss(q, batch.returns, batch.weights.masked_fill(gone, 0.0))
        return loss, {"train/q_loss": loss.detach()}
