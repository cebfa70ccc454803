"""The picture of a reward model: how it learned, how far its probabilities can be believed, and where it is right."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agents.runs.picture_style import BLUE, GREEN, INK, MUTED, ORANGE, blank_figure, dress
from lmgym.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHING = 10  # updates, of the training loss

Rows = Sequence[Mapping[str, Any]]


def draw_reward(rows: Rows, summary: Mapping[str, Any], png_path: str | os.PathLike[str]) -> None:
    """Draws a run: loss, calibration, accuracy against the margin, and against gold or strength where there is one.

    Args:
        rows: of its `metrics.jsonl`. summary: of the run, with what was held out. png_path: where the picture goes.
    """
    picture = io.BytesIO()
    figure_of(rows, summary).savefig(picture)
    write_atomically(png_path, picture.getvalue())


def figure_of(rows: Rows, summary: Mapping[str, Any]) -> Figure:
    """The picture of rows of metrics and a summary."""
    figure = blank_figure(10, 7.4)
    axes = figure.subplots(2, 2).flatten()
    held_out = summary["held_out"]
    _draw_loss(axes[0], rows)
    _draw_calibration(axes[1], held_out)
    _draw_accuracy(axes[2], held_out["by_margin"], "accuracy on held-out pairs", "difference of the two scores", BLUE)
    gold = summary["gold"]
    if gold is not None and gold["by_gap"]:
        _draw_accuracy(axes[3], gold["by_gap"], "agreement with gold", "difference of the two gold scores", GREEN)
    elif held_out["by_strength"]:
        _draw_accuracy(axes[3], held_out["by_strength"], "accuracy on held-out pairs", "strength given", GREEN)
    else:
        axes[3].set_visible(False)
    accuracy = held_out["accuracy"]
    title = f"reward model ({summary['reward']['objective']}) of {summary['model']}, seed {summary['seed']}: "
    title += f"{100 * accuracy['mean']:.1f} % of held-out pairs"
    figure.suptitle(title, fontsize=13.5, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def _draw_loss(axes: Axes, rows: Rows) -> None:
    dress(axes, "loss", label="update")
    steps = [row["step"] for row in rows if row.get("train/loss") is not None]
    losses = [row["train/loss"] for row in rows if row.get("train/loss") is not None]
    means = []
    for i in range(len(losses)):
        window = losses[max(0, i + 1 - _SMOOTHING) : i + 1]
        means.append(sum(window) / len(window))
    axes.plot(steps, losses, color=BLUE, linewidth=0.7, alpha=0.35)
    axes.plot(steps, means, color=BLUE, linewidth=1.8, label="training")
    looks = [(row["step"], row["eval/loss"]) for row in rows if row.get("eval/loss") is not None]
    if looks:
        axes.plot(*zip(*looks, strict=True), color=ORANGE, linewidth=1.8, marker="o", markersize=4, label="held out")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)


def _draw_calibration(axes: Axes, held_out: Mapping[str, Any]) -> None:
    dress(axes, "calibration", label="predicted probability of the better-scored one")
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1.2, linestyle="--", label="calibrated")
    _points(axes, held_out["calibration"], BLUE)
    axes.set_ylabel("share preferred by people", fontsize=10, color=MUTED)
    axes.set_xlim(0.49, 1.01)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower right")


def _draw_accuracy(axes: Axes, bins: Rows, title: str, label: str, color: str) -> None:
    dress(axes, title, label=label)
    axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=":")
    _points(axes, bins, color)
    axes.set_xlim(left=0)
    axes.set_ylim(top=1.02)


def _points(axes: Axes, bins: Rows, color: str) -> None:
    """Shares of bins with their 95 % intervals."""
    centres = [part["centre"] for part in bins]
    shares = [part["share"]["mean"] for part in bins]
    below = [part["share"]["mean"] - part["share"]["low"] for part in bins]
    above = [part["share"]["high"] - part["share"]["mean"] for part in bins]
    axes.errorbar(
        centres, shares, [below, above], color=color, linewidth=1.5, marker="o", markersize=5, elinewidth=1, capsize=2
    )
