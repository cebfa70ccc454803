"""Figures of the shares of the gain that agents end with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from agents.comparison.figures import Look, Panel, file_name, label_axes, new_axes
from agents.comparison.study import Study
from agents.runs.picture_style import BLUE, INK, MUTED, ORANGE
from lmgym.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST = 3  # seeds of which a band says something
LOWEST = -0.25  # of the gain: what is below is drawn at the edge
STATISTIC_TITLES = {
    "iqm": "interquartile mean",
    "mean": "mean",
    "median": "median over tasks",
    "optimality_gap": "optimality gap (less is better)",
}
SHARE = "share of the gain"

Looks = Mapping[str, Look]


def draw_aggregates(study: Study, looks: Looks) -> list[Panel]:
    """A panel a statistic: a row a label, with its interval."""
    assert study.matrix is not None
    panels = []
    for name, title in STATISTIC_TITLES.items():
        found = {label: study.aggregates[name][label] for label in study.matrix.labels}
        figure, axes = new_axes(title, height=0.95 + 0.24 * len(found))
        for row, (label, interval) in enumerate(found.items()):
            _draw_interval(axes, interval, row, looks[label])
        axes.set_yticks(range(len(found)), list(found), fontsize=9.5, color=INK)
        axes.set_ylim(len(found) - 0.4, -0.6)
        if name != "optimality_gap":
            _limit(axes, list(found.values()))
        label_axes(axes, SHARE if name != "optimality_gap" else "missing to the optimum")
        numbers = "; ".join(f"{label} {interval.mean:.3f}" for label, interval in found.items())
        panels.append(Panel(f"aggregate-{name}".replace("_", "-"), figure, f"{title} with 95 % intervals: {numbers}."))
    return panels


def draw_tasks(study: Study, looks: Looks) -> list[Panel]:
    """The suite by difficulty: a panel a task, a row a label, the easiest task first."""
    panels = []
    for number, task in enumerate(study.tasks):
        cells = {label: study.cell(label, task) for label in study.labels}
        found = {label: interval for label, interval in cells.items() if interval is not None}
        if not found:
            continue
        found = dict(sorted(found.items(), key=lambda item: -item[1].mean))
        figure, axes = new_axes(task, height=0.95 + 0.24 * len(found))
        for row, (label, interval) in enumerate(found.items()):
            for run in study.table.of(label, task):
                share = run.graded("normalised")
                if share is not None:
                    at = max(LOWEST, share.mean)
                    axes.plot(at, row, marker="|", color=looks[label].color, markersize=7, gid=looks[label].gid)
            _draw_interval(axes, interval, row, looks[label])
        axes.axvline(1, color=INK, linewidth=1, linestyle="--")
        axes.axvline(0, color=MUTED, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(found)), list(found), fontsize=9.5, color=INK)
        axes.set_ylim(len(found) - 0.4, -0.6)
        _limit(axes, list(found.values()))
        label_axes(axes, SHARE)
        numbers = "; ".join(f"{label} {interval.mean:.3f}" for label, interval in found.items())
        alt = f"Share of the gain on {task}, mean over seeds with 95 % intervals: {numbers}."
        panels.append(Panel(file_name("task", number, task), figure, alt))
    return panels


def draw_profiles(study: Study, looks: Looks) -> Panel:
    """The share of runs that have at least so much of the gain."""
    assert study.matrix is not None
    figure, axes = new_axes("share of runs above a share of the gain", width=6.2, height=3.6)
    for label, band in study.profiles.items():
        look = looks[label]
        if min(map(len, study.matrix.strata(label))) >= FEWEST:
            axes.fill_between(band.at, band.low, band.high, color=look.color, alpha=0.1, linewidth=0, gid=look.gid)
        axes.plot(band.at, band.value, color=look.color, linestyle=look.dash, linewidth=1.8, gid=look.gid)
        every = max(1, len(band.at) // 8)
        start = look.number % every
        axes.plot(
            band.at[start::every], band.value[start::every], look.marker, color=look.color, markersize=4, gid=look.gid
        )
    axes.set_xlim(float(min(band.at[0] for band in study.profiles.values())), 1.05)
    axes.set_ylim(-0.02, 1.02)
    label_axes(axes, f"at least this {SHARE}", "share of runs")
    alt = "Performance profiles: for each agent, the share of its runs that have at least a given share of the gain."
    return Panel("profiles", figure, alt, wide=True, legend={label: looks[label] for label in study.profiles})


def draw_improvement(study: Study) -> Panel:
    """The probability that a run of the row's label is better than one of the column's."""
    from matplotlib.patches import Rectangle

    assert study.matrix is not None
    labels = study.matrix.labels
    size = 1.6 + 0.44 * len(labels)
    figure, axes = new_axes("P(row better than column)", width=size + 0.5, height=size)
    for i, row in enumerate(labels):
        for j, column in enumerate(labels):
            if i == j:
                continue
            chance = study.pair(row, column).improvement
            color = BLUE if chance.mean >= 0.5 else ORANGE
            strength = 0.75 * 2 * abs(chance.mean - 0.5)
            axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, color=color, alpha=strength, linewidth=0))
            sure = chance.low > 0.5 or chance.high < 0.5
            weight = "bold" if sure else "normal"
            text = _percentage(chance.mean)
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=INK, fontweight=weight)
    axes.grid(False)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(labels)), labels, fontsize=9.5, color=INK)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_aspect("equal")
    alt = "Matrix of the probability that a run of one agent is better than a run of another; its numbers are below."
    return Panel("improvement", figure, alt, wide=True)


def _percentage(share: float) -> str:
    """`.75`, `0` or `1`."""
    text = f"{share:.2f}"
    return text.removeprefix("0") if text not in ("0.00", "1.00") else text[0]


def _draw_interval(axes: Axes, interval: Interval, row: float, look: Look) -> None:
    """A dot with its interval; what lies beyond the left edge is a triangle at it."""
    draw = axes.plot
    if interval.mean < LOWEST:
        draw(LOWEST, row, marker="<", color=look.color, markersize=7, gid=look.gid)
        return
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        ends = [max(LOWEST, interval.low), interval.high]
        draw(ends, [row, row], color=look.color, linewidth=2.4, alpha=0.55, solid_capstyle="butt", gid=look.gid)
    draw(interval.mean, row, marker=look.marker, color=look.color, markersize=6, gid=look.gid)


def _limit(axes: Axes, intervals: list[Interval]) -> None:
    """Room for all means, and for their intervals as far as they are not much wider than that."""
    low = min(max(LOWEST, interval.mean) for interval in intervals)
    high = max(interval.mean for interval in intervals)
    lows = [interval.low for interval in intervals if math.isfinite(interval.low)]
    highs = [interval.high for interval in intervals if math.isfinite(interval.high)]
    low = min([low, *(max(LOWEST, x) for x in lows)])
    high = max([high, *(min(1.2, x) for x in highs)])
    margin = 0.04 * (high - low) + 0.005
    axes.set_xlim(low - margin, high + margin)
