"""Agents that judge a response by the others to its prompt: one advantage a response, the same at all of its tokens.

The KL is in the reward, unless an algorithm says otherwise. At pi* the return of every response to a prompt is then
V*(x): the group's advantages are 0, whatever scales them.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from agents.advantages import batch_standardised, group_standardised
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import GroupConfig, ScaledGroupConfig
from lmgym.episodes import Episodes
from lmgym.kl import discounted_return


class GroupAgent(OnPolicyAgent):
    """Has no critic: the baseline is the mean return of the group."""

    config: GroupConfig

    @property
    def uses_critic(self) -> bool:
        """False: the baseline is that of the group."""
        return False

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """What `compare` says of each response, at every token of it."""
        returns = discounted_return(rewards, self.envs.gamma)
        advantages = self.compare(returns).unsqueeze(1)
        return torch.where(episodes.response_mask, advantages, 0.0), torch.zeros_like(rewards)

    @abstractmethod
    def compare(self, returns: Tensor) -> Tensor:
        """(B,) advantages of responses from their returns (B,), group by group."""


class ScaledGroupAgent(GroupAgent):
    """Divides the differences of returns in a group by a standard deviation."""

    config: ScaledGroupConfig

    def compare(self, returns: Tensor) -> Tensor:
        """(B,) R_i - mean R of the group, over the standard deviation of the group, or of the batch."""
        if self.config.scale == "group":
            return group_standardised(returns, self.config.group_size)
        return batch_standardised(returns, self.config.group_size)
