"""Proximal policy optimisation (Schulman et al. 2017) with the KL penalty in the reward (Ziegler et al. 2019).

`conf/experiment/` has the choices that well-known code makes among these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from agents.advantages import whiten
from agents.batch import Batch, Minibatch
from agents.losses import clipped_policy_loss, clipped_value_loss
from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig
from agents.policies.actor_critic import TrainablePolicy
from agents.update import Loss
from lmgym.data.rows import read_texts
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import token_log_probs
from lmgym.models.padding import pad_right
from lmgym.models.sampling import Sampler
from lmgym.ranges import Count, Fraction, NonNegative, Positive, Range

AboveOne = Annotated[float, Range(1, open_low=True)]


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """PPO's own numbers."""

    gae_lambda: Fraction = 0.95  # 0 is one-step TD, 1 is Monte Carlo
    clip_range: Positive = 0.2  # of the ratio
    clip_range_high: Positive | None = None  # of the ratio upwards; null is clip_range
    dual_clip: AboveOne | None = None  # times a negative advantage is the most that its token adds to the loss
    clip_range_value: Positive | None = 0.2  # of the value around its old one; null does not clip
    vf_coef: NonNegative = 0.5  # weight of the value loss
    entropy_coef: NonNegative = 0.0  # weight of an entropy bonus
    loss_mean: Literal["token", "episode"] = "token"  # over tokens, or over episodes of their means over tokens
    whiten_rewards: bool = False  # to standard deviation 1 over the batch, the mean stays
    whiten_advantages: Literal["batch", "minibatch", "none"] = "batch"  # to mean 0 and standard deviation 1
    target_kl: Positive | None = None  # nats a token between the old policy and the new: past 1.5 times it a batch ends
    ptx_coef: NonNegative = 0.0  # weight of -log p of texts, nats a token: InstructGPT's pre-training mix
    ptx_texts: str | None = None  # those texts: a file, one a line, or JSON lines with "text"
    ptx_batch_size: Count = 16  # texts an optimiser step

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ptx_texts is None) != (self.ptx_coef == 0):
            expected = "null where `ptx_coef` is 0" if self.ptx_coef == 0 else "a file where `ptx_coef` is above 0"
            raise InvalidArgumentError(f"`ptx_texts` must be {expected}, got {self.ptx_texts!r}.")
        if self.ptx_texts is not None:
            read_texts("ptx_texts", self.ptx_texts, "text")


class PPO(OnPolicyAgent):
    """The clipped surrogate on GAE advantages, with a clipped value loss."""

    Config = PPOConfig
    config: PPOConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: PPOConfig, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._texts = [] if config.ptx_texts is None else self._pieces(config.ptx_texts)

    @property
    def unmasked(self) -> TrainablePolicy:
        """What learns from texts."""
        return self.policy

    def rewards(self, episodes: Episodes) -> Tensor:
        """(B, T) both halves of the KL and the score, scaled over the batch on demand (Ziegler et al. 2019's code)."""
        rewards = super().rewards(episodes)
        if self.config.whiten_rewards:
            rewards = whiten(rewards, episodes.response_mask, shift_mean=False)
        return rewards

    def advantages(self, episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """GAE over the tokens of each episode; one that was truncated is bootstrapped with V of its last state."""
        advantages, returns = self.gae(episodes, rewards, self.config.gae_lambda)
        if self.config.whiten_advantages == "batch":
            advantages = whiten(advantages, episodes.response_mask)
        return advantages, returns

    def losses(self, minibatch: Batch) -> Iterator[Loss]:
        """Yields the losses of one step: of advantages whitened over the minibatch, and of texts, if config says so."""
        if self.config.whiten_advantages == "minibatch":
            whitened = whiten(minibatch.advantages, minibatch.episodes.response_mask)
            minibatch = replace(minibatch, advantages=whitened)
        yield from super().losses(minibatch)
        if self._texts:
            yield self.text_loss()

    def loss(self, batch: Minibatch) -> Loss:
        """L_clip + vf_coef * L_value - entropy_coef * entropy (Schulman et al. 2017, eq. 9, negated)."""
        config = self.config
        weights = batch.weights
        if config.loss_mean == "episode":
            weights = batch.episode_weights / batch.lengths
        policy = clipped_policy_loss(
            batch.log_probs,
            batch.old_log_probs,
            batch.advantages,
            weights,
            config.clip_range,
            config.clip_range_high,
            config.dual_clip,
        )
        value = clipped_value_loss(batch.values, batch.old_values, batch.returns, weights, config.clip_range_value)
        loss = policy.loss + config.vf_coef * value
        if config.entropy_coef:
            loss = loss - config.entropy_coef * (weights * batch.entropies).sum()
        return loss, {
            "train/policy_loss": policy.loss.detach(),
            "train/value_loss": value.detach(),
            "train/clip_fraction": policy.clip_fraction,
            "train/approx_kl": policy.approx_kl,
        }

    def text_loss(self) -> Loss:
        """ptx_coef times the mean of -log p over the tokens of some texts (Ouyang et al. 2022, eq. 2, negated)."""
        drawn = torch.randint(len(self._texts), (self.config.ptx_batch_size,), generator=self.generator)
        ids, mask = (x.to(self.policy.device) for x in pad_right([self._texts[i] for i in drawn], 0))
        rows, columns = mask[:, 1:].nonzero(as_tuple=True)  # the position before each token but the first
        loss = -token_log_probs(self.unmasked.read_at(ids, rows, columns).logits, ids[rows, columns + 1]).mean()
        self.tokens.forward += int(mask.sum())
        self.tokens.backward += int(mask.sum())
        return self.config.ptx_coef * loss, {"train/ptx_loss": loss.detach()}

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Whether the last step has moved the policy past 1.5 times `target_kl`; that step stays.

        The limit is SB3's, which measures the KL before a step, and leaves that step out.
        """
        return self.config.target_kl is not None and metrics["train/approx_kl"] > 1.5 * self.config.target_kl

    def _pieces(self, path: str) -> list[list[int]]:
        """Token ids of the texts of a file, an end token after each, cut to what an episode has room for."""
        lm = self.envs.engine.lm
        room = self.envs.engine.width + self.envs.engine.horizon
        end = [] if lm.tokenizer.eos_token_id is None else [lm.tokenizer.eos_token_id]
        try:
            texts = [lm.encode(text) for text in read_texts("ptx_texts", path, "text")]
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"`ptx_texts` must hold texts of the task's tokenizer: {error}") from error
        whole = [ids if ids[-1:] == end else ids + end for ids in texts]
        pieces = [ids[start : start + room] for ids in whole for start in range(0, len(ids), room)]
        pieces = [ids for ids in pieces if len(ids) > 1]
        if not pieces:
            raise InvalidArgumentError(f"`ptx_texts` must hold a text of two tokens or more, and {path!r} has none.")
        return pieces
