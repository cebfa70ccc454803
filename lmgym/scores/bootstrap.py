"""Bootstrap intervals of what is computed from runs in strata: the runs of a task are drawn again, task by task.

Shapes: M tasks, n_m runs on task m, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import check_int
from lmgym.intervals import LEVEL, Interval, t_quantile

RESAMPLES = 10_000


def resample(
    strata: Sequence[NDArray[np.float64]], resamples: int, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Draws the runs of every task anew, with replacement: from (n_m, ...) each, (R, n_m, ...) each."""
    check_int("resamples", resamples, 1)
    return [runs[rng.integers(len(runs), size=(resamples, len(runs)))] for runs in strata]


def tail(sizes: Sequence[int], *, expanded: bool = True) -> float:
    """The probability that an end of a percentile interval leaves outside, of strata with so many runs.

    It is 2.5 % for the plain percentile interval, which is too narrow: a resample of n runs varies like (n - 1) / n of
    the variance, and by the normal quantile instead of Student's. The expanded interval (Hesterberg 2015, "What
    teachers should know about the bootstrap", section 5) goes out as far as makes up for both.
    """
    runs = sum(sizes)
    freedom = runs - len(sizes)
    if not expanded or freedom == 0:
        return (1 - LEVEL) / 2
    return 0.5 * math.erfc(t_quantile(freedom) * math.sqrt(runs / freedom) / math.sqrt(2))


def percentile_interval(
    estimate: float, replicates: NDArray[np.float64], sizes: Sequence[int], *, expanded: bool = True
) -> Interval:
    """The interval between two percentiles of what the resamples gave.

    A stratum of one run shows nothing of how runs vary: the interval is then infinite.

    Args:
        estimate: what the runs themselves give. replicates: (R,) what their resamples give.
        sizes: n_m of every stratum that was resampled.
        expanded: whether to widen the interval for small samples (see `tail`).
    """
    if min(sizes) == 1:
        return Interval(estimate, -math.inf, math.inf)
    outside = tail(sizes, expanded=expanded)
    ends = np.quantile(replicates, [outside, 1 - outside])
    return Interval(estimate, float(ends[0]), float(ends[1]))
