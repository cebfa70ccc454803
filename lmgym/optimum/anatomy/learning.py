"""What keeps a policy from getting better: its critic, its class, and the estimator of its gradient.

Shapes: X prompts, N_t prefixes of t tokens of one prompt, R estimates, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CriticError:
    """How far a critic is from V^pi at the states that the policy visits, by how often it does.

    Attributes:
        rmse: root of the mean squared error, in units of the score. bias: the mean error.
        spread: standard deviation of V^pi over these states.
        explained_variance: 1 - Var(V^pi - critic) / Var(V^pi); None where V^pi is the same everywhere.
        rmse_by_step: T; None of a step that no response comes to.
    """

    rmse: float
    bias: float
    spread: float
    explained_variance: float | None
    rmse_by_step: list[float | None]

    @classmethod
    def of(cls, critic: Sequence[Tensor], values: Sequence[Tensor], visits: Sequence[Tensor]) -> CriticError:
        """From (X, N_t) numbers of each level: what the critic says, V^pi, and how often a prefix is visited."""
        weights = torch.cat([w.flatten() for w in visits])
        weights = weights / weights.sum()
        truth = torch.cat([v.flatten() for v in values])
        errors = torch.cat([(c - v).flatten() for c, v in zip(critic, values, strict=True)])
        bias = weights @ errors
        variance = weights @ (truth - weights @ truth).square()
        left = weights @ (errors - bias).square()
        by_step: list[float | None] = []
        for c, v, w in zip(critic, values, visits, strict=True):
            mass = w.sum().item()
            by_step.append(math.sqrt((w * (c - v).square()).sum().item() / mass) if mass else None)
        return cls(
            rmse=(weights @ errors.square()).sqrt().item(),
            bias=bias.item(),
            spread=variance.sqrt().item(),
            explained_variance=1 - (left / variance).item() if variance > 0 else None,
            rmse_by_step=by_step,
        )


@dataclass(frozen=True)
class GradientQuality:
    """How good an estimator g of a gradient is.

    Attributes:
        bias: |E g - gradient| / |gradient|. norm: |E g| / |gradient|.
        cosine: of the angle between E g and the gradient. variance: tr Cov g / |gradient|^2.
        cosine_error: the standard error of the cosine; 0 where it is exact.
    """

    bias: float
    norm: float
    cosine: float
    variance: float
    cosine_error: float = 0.0

    @classmethod
    def of(cls, probs: Tensor, estimates: Tensor, gradient: Tensor) -> GradientQuality:
        """From (R,) probabilities, (R, P) estimates and the gradient (P,): exact."""
        mean = probs @ estimates
        size = gradient.norm()
        variance = probs @ (estimates - mean).square().sum(1)
        cosine = mean @ gradient / (mean.norm() * size)
        bias = (mean - gradient).norm() / size
        return cls(float(bias), float(mean.norm() / size), float(cosine), float(variance / size**2))

    @classmethod
    def of_samples(cls, estimates: Tensor, gradient: Tensor) -> GradientQuality:
        """From (R, P) independent estimates, R of 2 or more, and the gradient (P,).

        |E g|^2 is estimated by the mean product of two different estimates, for the square of their mean is too large
        by the noise. The cosine is at most 1 in size; where the noise drowns E g it is 0. Its standard error is that
        of the jackknife.
        """
        estimates = estimates.double()
        gradient = gradient.double()
        count = len(estimates)
        size = gradient.norm()
        along = estimates @ gradient / size  # (R,)
        total = estimates.sum(0)
        squares = estimates.square().sum(1)
        square = (total @ total - squares.sum()) / (count * (count - 1))
        mean_along = along.mean()
        # Without each estimate in turn.
        shorter = total - estimates
        rest = (shorter.square().sum(1) - (squares.sum() - squares)) / max((count - 1) * (count - 2), 1)
        cosines = _cosine((along.sum() - along) / (count - 1), rest)
        error = ((count - 1) / count * (cosines - cosines.mean()).square().sum()).sqrt()
        bias = (square - 2 * mean_along * size + size**2).clamp(min=0).sqrt() / size
        return cls(
            bias=bias.item(),
            norm=(square.clamp(min=0).sqrt() / size).item(),
            cosine=_cosine(mean_along, square).item(),
            variance=((squares.mean() - square) / size**2).item(),
            cosine_error=error.item(),
        )


def _cosine(along: Tensor, square: Tensor) -> Tensor:
    """`along` / sqrt(`square`) within -1 and 1, 0 where the square is not positive."""
    cosine = along / square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
    return torch.where(square > 0, cosine.clamp(-1, 1), 0.0)
