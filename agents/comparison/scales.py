"""The scale on which the reference is 0 and the optimum 1, as it is known by now."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from lmgym.intervals import Interval
from lmgym.scores import normalised, reference_return
from lmgym.tasks import StoredOptimum, make_task, registered_tasks


def regraded(summary: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """A summary with the normalised returns of its J on the scale that is known now of a task and its test prompts.

    Where a bound of V* is tighter than when a run ended, the run need not be repeated.

    Args:
        summary: of a run; one that is empty stays so.
        task: that it was graded on, as it is registered; None keeps the scale that it has.
    """
    optimum = None if task is None or not summary else known_optimum(task)
    if optimum is None:
        return dict(summary)
    reference = reference_return(optimum)
    lower, upper = (None if x is None else vars(Interval.point(x)) for x in (optimum.lower, optimum.upper))
    scale: dict[str, Any] = {"reference": vars(reference), "lower": lower, "upper": upper, "value": optimum.value}
    scale |= {"method": optimum.method, "assumption": optimum.assumption or None, "unknown": None}
    graded = dict(summary)
    for when in ("before", "after"):
        share = share_of(interval_of(summary[when].get("return")), reference, optimum)
        graded[when] = {**summary[when], "normalised": None if share is None else vars(share)}
    return graded | {"optimum": {**(summary.get("optimum") or {}), **scale}}


@functools.cache
def known_optimum(task: str) -> StoredOptimum | None:
    """What is known of V* on the test prompts of a registered task; None where nothing is, or nothing is to gain."""
    if task not in registered_tasks():
        return None
    made = make_task(task)
    optimum = made.optima.get("test")
    if optimum is None:
        from lmgym.optimum import find_known  # which loads torch

        optimum = find_known(made, "test")
    return optimum if optimum is not None and optimum.value > optimum.reference else None


def optimum_of(summary: Mapping[str, Any]) -> tuple[Interval, StoredOptimum] | None:
    """The scale in a summary: J_ref and V*; None where one of them is not known, or nothing is to gain."""
    known = summary.get("optimum") or {}
    reference = interval_of(known.get("reference"))
    value = known.get("value")
    if reference is None or value is None or not value > reference.mean:
        return None
    lower = interval_of(known.get("lower"))
    upper = interval_of(known.get("upper"))
    optimum = StoredOptimum(
        str(known.get("method")),
        value,
        value if lower is None else lower.mean,
        None if upper is None else upper.mean,
        reference.mean,
    )
    return reference, optimum


def share_of(value: Interval | None, reference: Interval, optimum: StoredOptimum) -> Interval | None:
    """The normalised return of J; None of one that is not known."""
    return None if value is None else normalised(value, reference, optimum)


def interval_of(numbers: Mapping[str, float | None] | None) -> Interval | None:
    """An interval of JSON; None where its mean is not known. An end that is not known is taken at the mean."""
    mean = None if numbers is None else numbers.get("mean")
    if numbers is None or mean is None:
        return None
    low = numbers.get("low")
    high = numbers.get("high")
    return Interval(mean, mean if low is None else low, mean if high is None else high)
