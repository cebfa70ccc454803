"""Identity preference optimisation (Azar et al. 2023): regression of the log-ratio of a pair on a constant.

Shapes: n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.algorithms.dpo import DPO, DPOConfig
from lmgym.ranges import Positive

TAU = 0.25  # of beta: then small differences in score count as they do in J


@dataclass(frozen=True)
class IPOConfig(DPOConfig):
    """IPO's own number."""

    tau: Positive | None = None  # probability of being preferred a nat; null is a quarter of beta


class IPO(DPO):
    """DPO with the squared loss, which has a finite optimum where labels are certain."""

    Config = IPOConfig
    config: IPOConfig

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(n,) of `ipo_loss`."""
        tau = TAU * self.beta if self.config.tau is None else self.config.tau
        return ipo_loss(chosen, rejected, tau)


def ipo_loss(chosen: Tensor, rejected: Tensor, tau: float) -> Tensor:
    """(h_chosen - h_rejected - 1 / (2 tau))^2, h = log pi / pi_ref (Azar et al. 2023, eq. 17).

    Args:
        chosen: (n,) log pi(y|x) / pi_ref(y|x) in nats of the preferred responses. rejected: (n,) of the others.
        tau: probability of being preferred, a nat; > 0.

    Returns:
        (n,) nats^2.
    """
    return (chosen - rejected - 1 / (2 * tau)).square()
