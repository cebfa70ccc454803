"""Scores that compare across tasks: how much of the possible gain a policy has."""

from __future__ import annotations

import math

from lmgym.errors import InvalidArgumentError
from lmgym.intervals import Interval
from lmgym.tasks.stored import StoredOptimum


def normalised(value: Interval, reference: Interval | float, optimum: StoredOptimum | float) -> Interval:
    """The normalised return s = (J - J_ref) / (V* - J_ref): 0 for the reference, 1 for the optimum, on every task.

    The interval holds what the errors of J and J_ref imply, to first order: ds/dJ = 1 / (V* - J_ref) and
    ds/dJ_ref = -(1 - s) / (V* - J_ref), taken as independent. Where V* is known within bounds only, the ends of the
    interval are taken at the bounds that make them widest.

    Args:
        value: J.
        reference: J_ref, estimated or exact.
        optimum: V*, exact or within its bounds. Nothing known above means that s is at most what it says.

    Raises:
        InvalidArgumentError: if V* is not above J_ref: there is nothing to gain.
    """
    reference = Interval.point(reference) if isinstance(reference, float) else reference
    known = StoredOptimum("", optimum, optimum, optimum, reference.mean) if isinstance(optimum, float) else optimum
    if not known.value > reference.mean:
        raise InvalidArgumentError(
            f"`optimum` must be above the return of the reference, {reference.mean:.6g}, got {known.value:.6g}."
        )
    share = _share(value, reference, known.value)
    # The better the best possible, the smaller the share.
    ends = [_share(value, reference, v) for v in (known.lower, known.upper) if v is not None and v > reference.mean]
    ends.append(share)
    return Interval(share.mean, min(end.low for end in ends), max(end.high for end in ends))


def reference_return(optimum: StoredOptimum) -> Interval:
    """J_ref as it is stored: a point where it is exact, else with the interval of the samples it comes from."""
    mean = optimum.reference
    half = optimum.reference_half_width
    return Interval(mean, mean - half, mean + half)


def _share(value: Interval, reference: Interval, optimum: float) -> Interval:
    gain = optimum - reference.mean
    share = (value.mean - reference.mean) / gain
    below = reference.mean - reference.low
    above = reference.high - reference.mean
    if share > 1:  # a higher reference then makes it larger
        below, above = above, below
    low = share - math.hypot(value.mean - value.low, (1 - share) * above) / gain
    high = share + math.hypot(value.high - value.mean, (1 - share) * below) / gain
    return Interval(share, low, high)
