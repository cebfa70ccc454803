"""What a run recorded over its course, and what it was graded at, against steps, seconds and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.comparison.scales import interval_of, optimum_of, share_of

GRADED = "eval/return"  # the metric of every grading
_ENDS = ("", "/low", "/high")  # of a grading's interval


@dataclass(frozen=True)
class Series:
    """A metric of a run over its course; all arrays are (n,).

    Attributes:
        step: env steps. seconds: of training. tokens: read forward and backward so far. value: of the metric.
    """

    step: NDArray[np.int64]
    seconds: NDArray[np.float64]
    tokens: NDArray[np.float64]
    value: NDArray[np.float64]


def read_series(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Series]:
    """What a run recorded and what it was graded at, by metric.

    A grading before training is at step 0, the one after at the last step; those in `metrics.jsonl` lie between.
    """
    batches = [row for row in rows if GRADED not in row]
    axes = _axes(batches, summary)
    found: dict[str, Series] = {}
    for metric in dict.fromkeys(name for row in batches for name in row if name not in ("step", "time")):
        present = np.array([row.get(metric) is not None for row in batches])
        values = np.array([row[metric] for row in batches if row.get(metric) is not None], dtype=float)
        steps, seconds, tokens = (axis[present] for axis in axes)
        found[metric] = Series(steps, seconds, tokens, values)
    return found | _gradings([row for row in rows if GRADED in row], axes, summary)


def _axes(batches: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Steps, seconds of training and tokens read, of each row of a training batch; (n,) each.

    Where a row has no seconds, those that the run took are shared out as its rows say that collecting and updating took
    them, or else evenly over the steps.
    """
    step = np.array([row["step"] for row in batches], dtype=np.int64)
    seconds = np.array([row.get("time") or np.nan for row in batches], dtype=float)
    if len(step) and np.isnan(seconds).any():
        parts = [(row.get("time/collect_seconds"), row.get("time/update_seconds")) for row in batches]
        known = all(collect is not None and update is not None for collect, update in parts)
        clock = np.cumsum(np.array(parts, dtype=float).sum(1)) if known else step.astype(float)
        total = summary.get("train_seconds")
        share = clock / clock[-1] if clock[-1] > 0 else clock
        seconds = share * total if total is not None else clock if known else np.full(len(step), np.nan)
    read = [(row.get("cost/forward_tokens"), row.get("cost/backward_tokens")) for row in batches]
    tokens = np.array([np.nan if f is None or b is None else f + b for f, b in read], dtype=float)
    return step, seconds, tokens


def _gradings(
    along: Sequence[Mapping[str, Any]], axes: tuple[Any, Any, Any], summary: Mapping[str, Any]
) -> dict[str, Series]:
    """The metrics `eval/...`, with the ends of their intervals as metrics of their own."""
    points = [_graded_row(row, axes, summary) for row in along]
    if summary:
        last = summary["total_timesteps"]
        points = [point for point in points if 0 < point["step"] < last]
        read = summary.get("forward_tokens", np.nan) + summary.get("backward_tokens", np.nan)
        ends = (("before", 0, 0.0, 0.0), ("after", last, summary["train_seconds"], read))
        before, after = (
            {"step": step, "seconds": seconds, "tokens": tokens, **_eval_metrics(summary[when])}
            for when, step, seconds, tokens in ends
        )
        points = [before, *points, after]
    found: dict[str, Series] = {}
    for metric in dict.fromkeys(name for point in points for name in point if name.startswith("eval/")):
        known = [point for point in points if point.get(metric) is not None]
        seconds, tokens, values = (
            np.array([point[name] for point in known], dtype=float) for name in ("seconds", "tokens", metric)
        )
        found[metric] = Series(np.array([point["step"] for point in known], dtype=np.int64), seconds, tokens, values)
    return found


def _eval_metrics(graded: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, numbers in graded.items():
        interval = interval_of(numbers)
        if interval is not None:
            ends = (interval.mean, interval.low, interval.high)
            found |= {f"eval/{name}{end}": value for end, value in zip(_ENDS, ends, strict=True)}
    return found


def _graded_row(row: Mapping[str, Any], axes: tuple[Any, Any, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """A grading along the way, its normalised return on the scale of the summary."""
    point: dict[str, Any] = {name: value for name, value in row.items() if name.startswith("eval/")}
    scale = optimum_of(summary)
    mean, low, high = (row.get(f"{GRADED}{end}") for end in _ENDS)
    if scale is not None:
        share = share_of(interval_of({"mean": mean, "low": low, "high": high}), *scale)
        point |= _eval_metrics({"normalised": None if share is None else vars(share)})
    step = row["step"]
    steps, seconds, tokens = axes
    forward = row.get("cost/forward_tokens")
    backward = row.get("cost/backward_tokens")
    at = row.get("time")
    point["step"] = step
    point["seconds"] = at if at is not None else _at(step, steps, seconds)
    point["tokens"] = _at(step, steps, tokens) if forward is None or backward is None else forward + backward
    return point


def _at(step: int, steps: NDArray[np.int64], values: NDArray[np.float64]) -> float:
    """The value at a step, on the line between the rows around it; a run begins at 0."""
    return float(np.interp(step, [0, *steps], [0.0, *values]))
