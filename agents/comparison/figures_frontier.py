"""Figures of what the score costs: the reward-KL frontier, and the gold score against the one that was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from agents.comparison.figures import Look, Panel, file_name, label_axes, new_axes
from agents.comparison.figures_course import running_mean
from agents.comparison.frontier import Frontier, find_frontier
from agents.comparison.names import own_task
from agents.comparison.scales import optimum_of
from agents.comparison.study import Study
from agents.runs.picture_style import INK, MUTED
from lmgym.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OFF_SCALE = 2.5  # times the KL of the policies that the frame is made for: what is farther is an arrow at its edge

Looks = Mapping[str, Look]
Point = tuple[Interval, Interval]


def draw_frontiers(study: Study, looks: Looks) -> list[Panel]:
    """A panel a task: where its policies ended, under the frontier where that is known."""
    panels = []
    for number, task in enumerate(study.tasks):
        points = points_of(study, task, "kl", "score")
        if not points:
            continue
        figure, axes = new_axes(task, height=3.3)
        widest = kl_limit(points)
        _draw_reference(axes, study, task)
        for label, (kl, score) in points.items():
            _draw_point(axes, kl, score, looks[label], widest)
        frontier = _frontier_of(study, task)
        if frontier is not None:
            _draw_frontier(axes, frontier, widest)
        axes.set_xlim(-0.03 * widest, 1.05 * widest)
        label_axes(axes, "KL from the reference (nats per response)", "score")
        ends = "; ".join(f"{label} {score.mean:.2f} at {kl.mean:.2f} nats" for label, (kl, score) in points.items())
        alt = f"Score against KL on {task}: {ends}."
        shown = {label: looks[label] for label in points}
        panels.append(Panel(file_name("frontier", number, task), figure, alt, legend=shown))
    return panels


def points_of(study: Study, task: str, x: str, y: str) -> dict[str, Point]:
    """The means over seeds of two metrics, with their intervals, by label."""
    found = {}
    for label in study.labels:
        first = study.cell(label, task, x)
        second = study.cell(label, task, y)
        if first is not None and second is not None:
            found[label] = (first, second)
    return found


def kl_limit(points: Mapping[str, Point]) -> float:
    """How many nats a frame has: all, or a few times the median where some policy has far more."""
    means = [kl.mean for kl, _ in points.values()]
    return max(0.5, min(max(means) * 1.05, OFF_SCALE * float(np.median(means)) + 0.5))


def known_scales(study: Study, task: str) -> str:
    """What of the frontier of a task is known, in words for the caption."""
    frontier = _frontier_of(study, task)
    if frontier is None:
        return "nothing bounds its frontier"
    return "exact frontier" if frontier.exact else "one bound: its V* is known within bounds, at its own price only"


def _frontier_of(study: Study, task: str) -> Frontier | None:
    names = {own_task(run.config) for run in study.table.finished if run.task == task}
    name = names.pop() if len(names) == 1 else None
    return None if name is None else find_frontier(name)


def _draw_frontier(axes: Axes, frontier: Frontier, widest: float) -> None:
    kl = np.linspace(0, 1.05 * widest, 200)
    score = frontier.score(kl)
    dash = "-" if frontier.exact else "--"
    axes.plot(kl, score, color=INK, linewidth=1.4, linestyle=dash)
    if frontier.exact:
        low, high = axes.get_ylim()
        top = max(high, float(score.max()) + 0.08 * float(np.ptp(score)))
        axes.fill_between(kl, score, top, color=MUTED, alpha=0.13, linewidth=0)
        axes.set_ylim(min(low, float(score.min())), top)


def _draw_reference(axes: Axes, study: Study, task: str) -> None:
    """The reference is at 0 nats, with its return for a score."""
    scales = [optimum_of(run.summary) for run in study.table.finished if run.task == task]
    known = [scale for scale in scales if scale is not None]
    if known:
        axes.plot(0, known[0][0].mean, marker="+", color=INK, markersize=9, markeredgewidth=1.6, clip_on=False)


def _draw_point(axes: Axes, kl: Interval, score: Interval, look: Look, widest: float) -> None:
    if kl.mean > widest:
        axes.plot(widest, score.mean, marker=">", color=look.color, markersize=7, gid=look.gid, clip_on=False)
        text = f"{kl.mean:.0f} nats"
        axes.annotate(
            text,
            (widest, score.mean),
            xytext=(-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=look.color,
            gid=look.gid,
        )
        return
    _draw_cross(axes, kl, score, look)


def _draw_cross(axes: Axes, x: Interval, y: Interval, look: Look) -> None:
    """A marker with the intervals of both numbers."""
    if all(map(math.isfinite, (x.low, x.high))):
        axes.plot([x.low, x.high], [y.mean, y.mean], color=look.color, linewidth=1.1, alpha=0.6, gid=look.gid)
    if all(map(math.isfinite, (y.low, y.high))):
        axes.plot([x.mean, x.mean], [y.low, y.high], color=look.color, linewidth=1.1, alpha=0.6, gid=look.gid)
    axes.plot(x.mean, y.mean, marker=look.marker, color=look.color, markersize=6.5, linestyle="", gid=look.gid)


def draw_gold(study: Study, looks: Looks) -> list[Panel]:
    """A panel a task that has a gold score: that score against the one that was trained on."""
    panels = []
    for number, task in enumerate(study.tasks):
        points = points_of(study, task, "score", "gold_score")
        if not points:
            continue
        figure, axes = new_axes(task, height=3.3)
        for label, (score, gold) in points.items():
            _draw_path(axes, study, label, task, looks[label])
            _draw_cross(axes, score, gold, looks[label])
        start = [mean_before(study, task, metric) for metric in ("score", "gold_score")]
        if start[0] is not None and start[1] is not None:
            axes.plot(start[0], start[1], marker="+", color=INK, markersize=9, markeredgewidth=1.6)
        _draw_diagonal(axes)
        label_axes(axes, "score (trained on)", "gold score (never trained on)")
        ends = "; ".join(f"{label} {gold.mean:.2f} at {score.mean:.2f}" for label, (score, gold) in points.items())
        alt = f"Gold score against the score trained on, on {task}: {ends}."
        panels.append(
            Panel(file_name("gold", number, task), figure, alt, legend={label: looks[label] for label in points})
        )
    return panels


def mean_before(study: Study, task: str, metric: str) -> float | None:
    """The mean over all runs on a task of a metric of the grading before training."""
    found = [run.graded(metric, "before") for run in study.table.finished if run.task == task]
    means = [interval.mean for interval in found if interval is not None]
    return float(np.mean(means)) if means else None


def _draw_path(axes: Axes, study: Study, label: str, task: str, look: Look) -> None:
    """How the two scores moved together in training: the mean over seeds of running means of batches."""
    paths = []
    for run in study.table.of(label, task):
        scores = run.series.get("rollout/score")
        golds = run.series.get("rollout/gold_score")
        if scores is not None and golds is not None and len(scores.value) == len(golds.value) > 2:
            at = np.linspace(0, 1, 40)
            grid = np.linspace(0, 1, len(scores.value))
            paths.append([np.interp(at, grid, running_mean(x.value)) for x in (scores, golds)])
    if paths:
        x, y = np.mean(paths, axis=0)
        axes.plot(x, y, color=look.color, linestyle=look.dash, linewidth=1.1, alpha=0.7, gid=look.gid)


def _draw_diagonal(axes: Axes) -> None:
    low = max(axes.get_xlim()[0], axes.get_ylim()[0])
    high = min(axes.get_xlim()[1], axes.get_ylim()[1])
    if low < high:
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=":")
