"""The picture of what labels are worth: the reward model, the return and the KL over the number of labels."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmgym.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE = "#0072B2"
_ORANGE = "#D55E00"
_GREEN = "#009E73"
_PURPLE = "#8B5FBF"
_INK = "#222222"
_MUTED = "#6B6B6B"
_GRID = "#E4E4E4"

Rows = Sequence[Mapping[str, Any]]


def draw_worth(result: Mapping[str, Any], png_path: str | os.PathLike[str]) -> None:
    """Draws `worth.json`: dots are means over seeds with their 95 % intervals.

    Args:
        result: its content. png_path: where the picture goes.
    """
    picture = io.BytesIO()
    figure_of(result).savefig(picture)
    write_atomically(png_path, picture.getvalue())


def figure_of(result: Mapping[str, Any]) -> Figure:
    """The picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    rows = [row for row in result["rows"] if row["round"] == result["rounds"] or not row["labels"]]
    _dress(left, "reward model: pairs ordered as gold does")
    _curve(left, rows, "reward_reference", _BLUE, "of the reference")
    _curve(left, rows, "reward_policy", _ORANGE, "of the policy")
    left.axhline(0.5, color=_MUTED, linewidth=1.2, linestyle=":")
    left.legend(frameon=False, fontsize=10, labelcolor=_INK)
    share = "share" if result["optimum"] is not None else "return"
    _dress(middle, "share of the gain in gold return" if share == "share" else "gold return")
    _curve(middle, rows, share, _GREEN, "")
    if share == "share":
        middle.axhline(1, color=_INK, linewidth=1.2, linestyle="--")
    _level(middle, rows, share, _GREEN)
    _dress(right, "KL from the reference (nats)")
    _curve(right, rows, "kl", _PURPLE, "")
    _level(right, rows, "kl", _PURPLE)
    title = f"{result['agent']} on {result['task']}, {result['total_timesteps']:,} tokens, {len(result['seeds'])} seeds"
    figure.suptitle(title, fontsize=13.5, color=_INK, x=0.01, ha="left", fontweight="bold")
    return figure


def _curve(axes: Axes, rows: Rows, name: str, color: str, label: str) -> None:
    """Means over the number of labels, on a scale that is logarithmic above the smallest number."""
    known = [row for row in rows if row["labels"] is not None and row[name] is not None]
    counts = [row["labels"] for row in known]
    if not counts:
        return
    means = [row[name]["mean"] for row in known]
    errors = [[_arm(row[name], "low") for row in known], [_arm(row[name], "high") for row in known]]
    axes.errorbar(counts, means, errors, color=color, label=label or None, linewidth=1.8, marker="o", capsize=3)
    axes.set_xscale("symlog", linthresh=max(1, min([count for count in counts if count], default=1)))
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()


def _level(axes: Axes, rows: Rows, name: str, color: str) -> None:
    """What a policy that was trained on the hidden score itself reached, as a line."""
    for row in rows:
        if row["labels"] is None and row[name] is not None:
            axes.axhline(row[name]["mean"], color=color, linewidth=1.2, linestyle=":", label="trained on gold")
            axes.legend(frameon=False, fontsize=10, labelcolor=_INK)


def _arm(interval: Mapping[str, float], end: str) -> float:
    """How far an interval reaches; 0 where that is not known, of one seed."""
    limit = interval[end]
    if limit is None or abs(limit) == float("inf"):
        return 0.0
    return abs(limit - interval["mean"])


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, color=_INK, pad=8)
    axes.set_xlabel("labels", fontsize=10, color=_MUTED)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(labelsize=10, colors=_MUTED, length=0)
