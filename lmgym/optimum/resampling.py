"""Resampling for sequential Monte Carlo: which particles go on, and how many copies of each.

Shapes: X runs, S particles a run, n children.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stratified(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Stratified resampling (Kitagawa 1996): child i is the particle at quantile (i + uniform_i) / n of the weights.

    Args:
        log_weights: (X, S), at least one finite in each row. uniforms: (X, n) float64 in [0, 1).

    Returns:
        (X, n) int64 ancestors, none of weight 0.
    """
    cumulative = log_weights.softmax(1).cumsum(1)
    n = uniforms.shape[1]
    quantiles = (torch.arange(n) + uniforms) / n
    # The sum may round to a little under 1, and no quantile may be above it.
    return torch.searchsorted(cumulative, torch.minimum(quantiles, cumulative[:, -1:] * (1 - 1e-15)), right=True)


def conditional_stratified(
    log_weights: Tensor, uniforms: Tensor, retained: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Stratified resampling given that the retained particle has a child that goes on as the retained one.

    Child i is that one with the probability that quantile i falls on the particle: the stratum of a uniform point of
    its share. `stratified` draws the other children. If the particle itself was drawn by its weight, the ancestors then
    have the distribution of `stratified`, and the child's index is uniform (as Chopin & Singh 2015 do for other
    schemes). The identity of conditional SMC needs both.

    Args:
        log_weights: (X, S). uniforms: (X, S) float64.
        retained: (X,) int64, the particle. points: (X,) float64 in [0, 1), where in its share the point is.

    Returns:
        ancestors (X, S), and the index (X,) of the retained child.
    """
    rows = torch.arange(len(retained))
    shares = log_weights.softmax(1)
    point = shares.cumsum(1)[rows, retained] - shares[rows, retained] * (1 - points)
    child = (point * shares.shape[1]).long().clamp(0, shares.shape[1] - 1)
    ancestors = stratified(log_weights, uniforms)
    ancestors[rows, child] = retained
    return ancestors, child
