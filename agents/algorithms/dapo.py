"""DAPO (Yu et al. 2025): decoupled clip and dynamic sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.advantages import mixed_groups, soft_overlong_penalty
from agents.batch import Batch, Minibatch
from agents.groups import ScaledGroupAgent
from agents.losses import clipped_policy_loss
from agents.on_policy import sample_batch
from agents.on_policy_config import ScaledGroupConfig
from agents.update import Loss
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import check_int
from lmgym.models.sampling import Sampler
from lmgym.ranges import Count, CountOrZero, NonNegative, Positive


@dataclass(frozen=True)
class DAPOConfig(ScaledGroupConfig):
    """DAPO's own numbers."""

    clip_range: Positive = 0.2  # of the ratio, downwards
    clip_range_high: Positive = 0.28  # of the ratio, upwards
    sampling_rounds: Count = 10  # rounds at most in which groups of equal scores are sampled again; 1 keeps them
    overlong_tokens: CountOrZero = 0  # the last ones before the length limit, over which a penalty grows; 0 is none
    overlong_penalty: NonNegative = 1.0  # taken off the score of a response that has them all


class DAPO(ScaledGroupAgent):
    """The clipped surrogate on standardised returns of groups whose scores differ, a mean over tokens."""

    Config = DAPOConfig
    config: DAPOConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: DAPOConfig, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        check_int("overlong_tokens", config.overlong_tokens, 0, self.envs.engine.horizon)

    def collect(self) -> Episodes:
        """All that was sampled for the batch that is learned from next, on the policy's device."""
        return self.faults.choose(self._sample_in_rounds)

    def describe(self, episodes: Episodes) -> dict[str, float]:
        """Metrics of all that was sampled, with the share and the number of the groups that dynamic sampling saw."""
        is_mixed = mixed_groups(episodes.scores, self.config.group_size)
        sampled = {"train/mixed_groups": is_mixed.float().mean().item(), "train/sampled_groups": float(len(is_mixed))}
        return super().describe(episodes) | sampled

    def shape(self, episodes: Episodes, progress: float = 0.0) -> Batch:
        """A batch of the groups whose scores differ, filled up with others where the rounds did not suffice."""
        return super().shape(self.choose(episodes), progress)

    def choose(self, episodes: Episodes) -> Episodes:
        """A batch of those sampled: groups of unequal scores first, in the order in which they were sampled."""
        config = self.config
        if config.sampling_rounds == 1:
            return episodes
        is_mixed = mixed_groups(episodes.scores, config.group_size)
        order = (~is_mixed).long().argsort(stable=True)[: config.batch_size // config.group_size]
        rows = order.sort().values.unsqueeze(1) * config.group_size
        return episodes[(rows + torch.arange(config.group_size, device=rows.device)).flatten()]

    def rewards(self, episodes: Episodes) -> Tensor:
        """Both halves of the KL and the score, less a penalty on long responses on demand."""
        rewards = super().rewards(episodes)
        cache = self.config.overlong_tokens
        if cache == 0:
            return rewards
        penalty = soft_overlong_penalty(episodes.lengths, self.envs.engine.horizon, cache)
        penalty = (self.config.overlong_penalty * penalty).to(rewards.dtype)
        return rewards.scatter_add(1, (episodes.lengths - 1).unsqueeze(1), penalty.unsqueeze(1))

    def loss(self, batch: Minibatch) -> Loss:
        """L_clip with two ranges, a mean over the tokens of the minibatch (Yu et al. 2025, eqs. 10 and 12, negated)."""
        config = self.config
        policy = clipped_policy_loss(
            batch.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.weights,
            config.clip_range,
            config.clip_range_high,
        )
        return policy.loss, policy.metrics

    def _sample_in_rounds(self) -> Episodes:
        """Samples a batch, then in rounds as many groups as have equal scores, and gives all of them."""
        size = self.config.group_size
        parts = [sample_batch(self)]
        missing = int((~mixed_groups(parts[0].scores, size)).sum())
        while missing and len(parts) < self.config.sampling_rounds:
            parts.append(sample_batch(self, missing * size))
            missing = int((~mixed_groups(parts[-1].scores, size)).sum())
        return Episodes.concatenate(parts)
