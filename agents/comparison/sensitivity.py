"""How much an agent depends on its settings: the defaults, one tuned setting for all tasks, and one for each task.

The difference of the last two is the sensitivity of Adkins et al. (2024, arXiv 2412.07165): what an agent loses where
one setting has to do for all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.comparison.figures import COLORS, Panel, label_axes, new_axes
from agents.comparison.markup import escape, table
from agents.comparison.terminal import shown
from agents.runs.picture_style import INK, MUTED
from agents.runs.sweeps import aligned
from lmgym.intervals import Interval
from lmgym.scores import student_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {"defaults": "defaults", "tuned": "tuned for all tasks", "tuned_by_task": "tuned for each task"}
_MARKERS = {"defaults": "o", "tuned": "s", "tuned_by_task": "^"}
_DEFAULTS = "the defaults"


@dataclass(frozen=True)
class Sensitivity:
    """What tuning has made of an agent, on the reported seeds.

    Attributes:
        agent: its name. trials: settings that were tried.
        defaults, tuned, tuned_by_task: (seeds,) shares of the gain, each a mean over tasks.
        best: the winner over all tasks, `key=value` each; none are the defaults. best_by_task: the winner on each task.
    """

    agent: str
    trials: int
    defaults: Sequence[float]
    tuned: Sequence[float]
    tuned_by_task: Sequence[float]
    best: Sequence[str]
    best_by_task: Mapping[str, Sequence[str]]

    def mean(self, kind: str) -> Interval:
        """Of one of `KINDS`, with Student's interval over seeds."""
        return student_interval(getattr(self, kind))

    def difference(self, kind: str, other: str) -> Interval:
        """How much one of `KINDS` is above another, with Student's interval of the differences of each seed."""
        return student_interval(np.subtract(getattr(self, kind), getattr(self, other)))

    @property
    def sensitivity(self) -> Interval:
        """What it loses where one setting has to do for all tasks."""
        return self.difference("tuned_by_task", "tuned")

    def as_values(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {**asdict(self), "sensitivity": self.sensitivity.mean}


def sensitivity_text(found: Sequence[Sensitivity]) -> str:
    """A line an agent, for a terminal."""
    rows = [["mean share of the gain", *KINDS.values(), "sensitivity", "tuned to"]]
    for x in found:
        shares = [shown(getattr(x, kind)) for kind in KINDS]
        rows.append([x.agent, *shares, f"{x.sensitivity.mean:.3f}", " ".join(x.best) or _DEFAULTS])
    return aligned(rows)


def draw_sensitivity(found: Sequence[Sensitivity]) -> Panel:
    """A row an agent, with a mark for each of `KINDS`."""
    figure, axes = new_axes("mean share of the gain over tasks", height=1.5 + 0.5 * len(found))
    for row, x in enumerate(found):
        for i, kind in enumerate(KINDS):
            _draw_mean(
                axes, x.mean(kind), row + 0.22 * (i - 1), COLORS[i], _MARKERS[kind], KINDS[kind] if not row else ""
            )
    axes.axvline(1, color=INK, linewidth=1, linestyle="--")
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(found)), [x.agent for x in found], fontsize=9.5, color=INK)
    axes.set_ylim(len(found) - 0.5, -0.5)
    label_axes(axes, "share of the gain")
    for text in figure.legend(loc="outside lower left", frameon=False, fontsize=9).get_texts():
        text.set_color(INK)
    told = "; ".join(
        f"{x.agent} {', '.join(f'{KINDS[kind]} {x.mean(kind).mean:.3f}' for kind in KINDS)}" for x in found
    )
    return Panel("tuning", figure, f"Mean share of the gain with 95 % intervals: {told}.")


def _draw_mean(axes: Axes, interval: Interval, row: float, color: str, marker: str, name: str) -> None:
    if np.isfinite([interval.low, interval.high]).all():
        axes.plot([interval.low, interval.high], [row, row], color=color, linewidth=2.4, alpha=0.55)
    axes.plot(interval.mean, row, marker=marker, color=color, markersize=6, linestyle="", label=name or "_")


def sensitivity_tables(found: Sequence[Sensitivity], tasks: Sequence[str]) -> str:
    """A row an agent: what it has with which settings, and the settings."""
    rows = []
    chosen = []
    for x in found:
        gain = x.difference("tuned", "defaults")
        rows.append([escape(x.agent), *map(_cell, (*(x.mean(kind) for kind in KINDS), gain, x.sensitivity))])
        best = [x.best, *(x.best_by_task.get(task, ()) for task in tasks)]
        chosen.append([escape(x.agent), *(escape(" ".join(values) or _DEFAULTS) for values in best)])
    caption = "Mean share of the gain over tasks, with 95 % intervals over seeds; differences are of the same seeds"
    numbers = table(caption, ["agent", *KINDS.values(), "gain by tuning", "sensitivity"], rows)
    settings = table("Settings that won", ["agent", "on all tasks", *tasks], chosen)
    return f"{numbers}<details><summary>Settings that won</summary>{settings}</details>"


def _cell(interval: Interval) -> str:
    if not np.isfinite([interval.low, interval.high]).all():
        return f"{interval.mean:.3f}"
    return f'{interval.mean:.3f} <span class="range">[{interval.low:.3f}, {interval.high:.3f}]</span>'
