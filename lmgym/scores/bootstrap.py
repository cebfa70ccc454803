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


def tail(strata: Sequence[NDArray[np.float64]], *, expanded: bool = True) -> float:
    """The probability that an end of a percentile interval leaves outside.

    It is 2.5 % for the plain percentile interval, which is too narrow for few runs: resamples of n runs vary by
    (n - 1) / n of their variance, and by the normal quantile instead of Student's. The expanded interval goes out as
    far as makes up for both (Hesterberg 2015, arXiv 1411.5279). Degrees of freedom are those of the mean over strata
    (Welch 1947, Satterthwaite 1946): a task whose runs spread much decides.

    Args:
        strata: (n_m,) runs, at least two in each. expanded: whether to go out further.
    """
    variances = np.asarray([runs.var(ddof=1) / len(runs) for runs in strata])
    if not expanded or not variances.any():
        return (1 - LEVEL) / 2
    sizes = np.asarray([len(runs) for runs in strata])
    freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
    too_narrow = (variances * (sizes - 1) / sizes).sum() / variances.sum()
    return 0.5 * math.erfc(t_quantile(float(freedom)) / math.sqrt(2 * too_narrow))


def percentile_interval(
    estimate: float,
    replicates: NDArray[np.float64],
    strata: Sequence[NDArray[np.float64]],
    *,
    expanded: bool = True,
) -> Interval:
    """The interval between two percentiles of what the resamples gave.

    A stratum of one run shows nothing of how runs vary: the interval is then infinite.

    Args:
        estimate: what the runs themselves give. replicates: (R,) what their resamples give.
        strata: (n_m,) the runs of all that was resampled.
        expanded: whether to widen the interval for few runs (see `tail`).
    """
    if min(len(runs) for runs in strata) == 1:
        return Interval(estimate, -math.inf, math.inf)
    outside = tail(strata, expanded=expanded)
    ends = np.quantile(replicates, [outside, 1 - outside])
    return Interval(estimate, float(ends[0]), float(ends[1]))
