"""VinePPO (Kazemnejad et al. 2024): PPO whose values are means of returns of rollouts from the states themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from agents.advantages import returns_to_go, segment_advantages, whiten
from agents.batch import Minibatch, clip_scores
from agents.losses import clipped_policy_loss
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.update import Loss
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import token_rewards
from lmgym.models.sampling import Sampler
from lmgym.ranges import Count, Positive
from lmgym.rollout import collect


@dataclass(frozen=True)
class VinePPOConfig(OnPolicyConfig):
    """VinePPO's own numbers."""

    batch_size: Count = 64
    rollouts: Count = 1  # K, from each state whose value is asked for
    segment: Count = 1  # tokens between such states; they share an advantage
    clip_range: Positive = 0.2  # of the ratio
    whiten_advantages: Literal["batch", "none"] = "batch"  # to mean 0 and standard deviation 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.collect == "steps":  # an observation does not tell which prompt an episode is of
            raise InvalidArgumentError("`collect` must be 'episodes' where rollouts start inside of responses.")


class VinePPO(OnPolicyAgent):
    """The clipped surrogate on advantages whose values are Monte Carlo estimates. Rollouts are env steps too."""

    Config = VinePPOConfig
    config: VinePPOConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: VinePPOConfig, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        if envs.gamma < 1 and not envs.task.dense_kl:
            raise InvalidArgumentError(
                "`dense_kl` must be True below gamma = 1, got False: a KL that is charged late is of no state's value."
            )
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self.rollout_tokens = 0  # those of the last batch

    @property
    def uses_critic(self) -> bool:
        """False: values are estimated by rollouts."""
        return False

    def collect(self) -> Episodes:
        """A batch, with values that rollouts of the policy as it is have estimated; counts their tokens as steps."""
        episodes = super().collect()
        self.rollout_tokens = 0
        values = self.estimate_values(episodes)
        self.num_timesteps += self.rollout_tokens
        return replace(episodes, values=values).with_tokenizer(self.envs.engine.lm.tokenizer)

    def estimate_values(self, episodes: Episodes) -> Tensor:
        """(B, T) V_MC(s_t) at the first token of each segment, 0 elsewhere (Kazemnejad et al. 2024, section 4)."""
        values = torch.zeros_like(episodes.log_probs)
        on_host = episodes.to("cpu")
        for t in range(0, int(on_host.lengths.max()), self.config.segment):
            rows = (on_host.lengths > t).nonzero().squeeze(1)
            means = self.roll_out(on_host, rows.repeat_interleave(self.config.rollouts), t)
            values[rows.to(values.device), t] = means.view(len(rows), -1).mean(1).to(values)
        return values

    def roll_out(self, episodes: Episodes, rows: Tensor, t: int) -> Tensor:
        """(n,) returns from s_t on, of one rollout from the state that each of rows (n,) was in before its token t."""
        returns = []
        sampler = self.faults.change_sampler(self.sampler)
        for part in rows.split(self.config.batch_size):
            prompts = [self.envs.engine.prompts[i] for i in episodes.prompt_index[part].tolist()]
            prefix = episodes.response_ids[part, :t]
            with self.faults.sampling():
                play = partial(collect, self.envs, self.policy, prompts, sampler, self.generator, prefix)
                rollouts = self.processes.play(len(prompts), play)
            self.tokens.read(rollouts)
            self.rollout_tokens += rollouts.num_tokens - prefix.numel()
            told = clip_scores(self.faults.tell(rollouts.to(self.policy.device)), self.config.score_clip)
            returns.append(returns_to_go(self.rewards(told), told.response_mask, self.envs.gamma)[:, t])
        return torch.cat(returns)

    def describe(self, episodes: Episodes) -> dict[str, float]:
        """Metrics of a batch, with the tokens of its rollouts."""
        return super().describe(episodes) | {"train/rollout_tokens": float(self.rollout_tokens)}

    def rewards(self, episodes: Episodes) -> Tensor:
        """The KL at the token where it arises, even if the task charges it at the end: V depends on the state alone."""
        return token_rewards(episodes, self.kl.value)

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """TD errors of whole segments; no value is learned."""
        assert episodes.values is not None
        mask = episodes.response_mask
        values = episodes.values.to(rewards.dtype)
        advantages = segment_advantages(rewards, values, mask, self.envs.gamma, self.config.segment)
        if self.config.whiten_advantages == "batch":
            advantages = whiten(advantages, mask)
        return advantages, torch.zeros_like(rewards)

    def loss(self, batch: Minibatch) -> Loss:
        """L_clip, a mean over tokens (Schulman et al. 2017, eq. 7, negated)."""
        policy = clipped_policy_loss(
            batch.log_probs, batch.old_log_probs, batch.advantages, batch.weights, self.config.clip_range
        )
        return policy.loss, policy.metrics
