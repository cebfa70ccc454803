"""Group sequence policy optimisation (Zheng et al. 2025): one ratio, and one clip, a response."""

from __future__ import annotations

from dataclasses import dataclass

from agents.batch import Minibatch
from agents.groups import ScaledGroupAgent
from agents.losses import approximate_kl, clipped_sequence_loss, response_means
from agents.on_policy_config import ScaledGroupConfig
from agents.update import Loss
from lmgym.ranges import Positive


@dataclass(frozen=True)
class GSPOConfig(ScaledGroupConfig):
    """GSPO's own numbers."""

    clip_range: Positive = 0.05  # of the geometric mean of a response's ratios, downwards
    clip_range_high: Positive = 0.05  # the same, upwards


class GSPO(ScaledGroupAgent):
    """The clipped surrogate of whole responses, their ratio normalised by length, on standardised returns."""

    Config = GSPOConfig
    config: GSPOConfig

    def loss(self, batch: Minibatch) -> Loss:
        """- mean over responses of min(s_i A_i, clip(s_i) A_i) (Zheng et al. 2025, eq. 5)."""
        config = self.config
        is_token = batch.episode_weights > 0
        log_ratios = batch.log_probs - batch.old_log_probs
        log_ratios = response_means(log_ratios, batch.positions, batch.lengths, is_token)
        weights = batch.episode_weights / batch.lengths
        policy = clipped_sequence_loss(log_ratios, batch.advantages, weights, config.clip_range, config.clip_range_high)
        return policy.loss, {
            "train/policy_loss": policy.loss.detach(),
            "train/clip_fraction": policy.clip_fraction,
            "train/approx_kl": approximate_kl(batch.log_probs, batch.old_log_probs, batch.weights),
        }
