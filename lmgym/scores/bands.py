"""Bands: a line over some axis for a label over all tasks, with what other seeds may give at each point.

Shapes: K points, M tasks, n_m runs on task m, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmgym.scores.bootstrap import resample, tail
from lmgym.scores.matrix import ScoreMatrix

BAND_RESAMPLES = 2_000


@dataclass(frozen=True, eq=False)
class Band:
    """A line with a 95 % interval at each of its points, (K,) each. The whole line may leave the band more often."""

    at: NDArray[np.float64]
    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def performance_profiles(
    matrix: ScoreMatrix,
    thresholds: ArrayLike | None = None,
    *,
    average_runs: bool = False,
    rng: np.random.Generator,
    resamples: int = BAND_RESAMPLES,
    expanded: bool = True,
) -> dict[str, Band]:
    """The share of scores above each threshold, for every label (Agarwal et al. 2021, section 4.2).

    A label whose line is above another's everywhere is better in every respect; lines that cross say where it is not.

    Args:
        matrix: the scores; every label needs a run on every task.
        thresholds: (K,); None takes 0, 0.01, ..., 1.
        average_runs: False counts runs (the run-score distribution), each task the same; True counts tasks, by their
            mean over runs (the average-run distribution), which is coarse with few tasks, and hides runs that fail.
        rng, resamples, expanded: of the bootstrap, as in `aggregate`.
    """
    given = np.linspace(0, 1, 101) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    profiles = {}
    for label in matrix.labels:
        strata = matrix.strata(label)
        shares = _shares(resample(strata, resamples, rng), given, average_runs)
        value = _shares([runs[None] for runs in strata], given, average_runs)[0]
        single = min(len(runs) for runs in strata) == 1
        outside = None if single else tail(strata, expanded=expanded)
        profiles[label] = band_of(given, value, shares, outside, (0.0, 1.0))
    return profiles


def band_of(
    at: NDArray[np.float64],
    value: NDArray[np.float64],
    replicates: NDArray[np.float64],
    outside: NDArray[np.float64] | float | None,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> Band:
    """The band between two percentiles of (R, K) replicates.

    Args:
        at, value: (K,) of the line.
        replicates: what the resamples give.
        outside: the probability beyond each end (`lmgym.scores.bootstrap.tail`), one or (K,); None where a task has a
            single run, and the band goes from limit to limit.
        limits: the least and the largest value there can be.
    """
    if outside is None:
        return Band(at, value, np.full_like(value, limits[0]), np.full_like(value, limits[1]))
    tails = np.broadcast_to(outside, value.shape)
    ends = [np.quantile(replicates[:, i], [tails[i], 1 - tails[i]]) for i in range(len(value))]
    return Band(at, value, np.asarray([end[0] for end in ends]), np.asarray([end[1] for end in ends]))


def _shares(
    strata: Sequence[NDArray[np.float64]], thresholds: NDArray[np.float64], average_runs: bool
) -> NDArray[np.float64]:
    """(R, n_m) for each task to (R, K)."""
    if average_runs:
        return np.mean([runs.mean(-1)[:, None] > thresholds for runs in strata], axis=0)
    return np.mean([(runs[..., None] > thresholds).mean(1) for runs in strata], axis=0)
