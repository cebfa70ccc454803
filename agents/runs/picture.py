"""The picture of a run: its curves, or the points of an agent that learns nothing."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.runs.picture_style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, blank_figure, dress
from agents.runs.recorder import read_rows
from agents.runs.report import is_known, optimum_bounds, problem, reference_of, share_of_gain, two_decimals
from lmgym.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Rows = list[dict[str, Any]]
Draw = Callable[["Axes", Rows, Mapping[str, Any]], None]


def curves(metrics_path: str | os.PathLike[str], summary: Mapping[str, Any], png_path: str | os.PathLike[str]) -> None:
    """Draws a run: return, score, KL, and length with entropy, or the loss of an agent that fits examples.

    Thin lines are what each batch measured, over env steps, thick ones their running mean. Dots at both ends are the
    evaluations before and after training with their 95 % intervals, and a line between them those along the way, with
    a band for theirs; dashed lines are the bounds of the optimum. An
    agent that learns nothing is a dot beside that of the reference. What was neither recorded nor graded has no axes.

    Args:
        metrics_path: The `metrics.jsonl` of the run.
        summary: As for `table`.
        png_path: Where the picture goes.
    """
    picture = io.BytesIO()
    figure_of(read_rows(metrics_path), summary).savefig(picture)
    write_atomically(png_path, picture.getvalue())


def figure_of(rows: Rows, summary: Mapping[str, Any]) -> Figure:
    """The picture of rows of metrics and a summary."""
    figure = blank_figure(10, 6.4)
    panels = _panels(rows, summary)
    across = min(2, len(panels))
    down = -(-len(panels) // 2)
    grid = figure.subplots(down, across, sharex=True, squeeze=False).flatten()
    for number, axes in enumerate(grid):
        if number >= len(panels):
            axes.set_visible(False)
            continue
        panels[number](axes, rows, summary)
        if number + across >= len(panels):
            axes.tick_params(labelbottom=True)
            _label_steps(axes, rows, summary)
    _title(figure, summary)
    return figure


def _panels(rows: Rows, summary: Mapping[str, Any]) -> list[Draw]:
    """What there is to draw."""
    panels: list[Draw] = [_draw_return]
    if _has(rows, summary, "score") or _has(rows, summary, "gold_score"):
        panels.append(_draw_scores)
    if _has(rows, summary, "kl"):
        panels.append(_draw_kl)
    if _series(rows, "train/loss")[0].size and not _series(rows, "train/entropy")[0].size:
        panels.append(_draw_loss)
    elif _has(rows, summary, "length"):
        panels.append(_draw_length_and_entropy)
    return panels


def _has(rows: Rows, summary: Mapping[str, Any], name: str) -> bool:
    graded = any(is_known(summary[when].get(name)) for when in ("before", "after"))
    return graded or bool(_series(rows, f"rollout/{name}")[0].size)


def _draw_return(axes: Axes, rows: Rows, summary: Mapping[str, Any]) -> None:
    dress(axes, "return per episode")
    _line(axes, rows, "rollout/return", BLUE, "training batches")
    reference = reference_of(summary)
    if is_known(reference):
        axes.axhline(reference["mean"], color=MUTED, linewidth=1.2, linestyle=":")
        _note(axes, reference["mean"], f"reference {two_decimals(reference['mean'])}", above=False)
    bounds = optimum_bounds(summary)
    for _, bound in bounds:
        axes.axhspan(bound["low"], bound["high"], color=INK, alpha=0.08, linewidth=0)
        axes.axhline(bound["mean"], color=INK, linewidth=1.2, linestyle="--")
    if len(bounds) == 2:  # one note, for the two may lie on each other
        lower = bounds[0][1]
        upper = bounds[1][1]
        axes.axhspan(lower["mean"], upper["mean"], color=INK, alpha=0.08, linewidth=0)
        _note(axes, upper["high"], f"optimum V* {lower['mean']:.2f} to {upper['mean']:.2f}", above=True)
    elif bounds:
        sign, bound = bounds[0]
        glyph = {">=": "\N{GREATER-THAN OR EQUAL TO}", "<=": "\N{LESS-THAN OR EQUAL TO}"}.get(sign, sign)
        _note(axes, bound["high"], f"optimum V* {glyph} {bound['mean']:.2f}", above=True)
    _held_out(axes, rows, summary)
    _ends(axes, rows, summary, "return", BLUE)
    axes.margins(y=0.12)


def _held_out(axes: Axes, rows: Rows, summary: Mapping[str, Any]) -> None:
    """The learning curve: the gradings along the way, from the one before training to the one after it."""
    low, high = (_series(rows, f"eval/return/{end}")[1] for end in ("low", "high"))
    steps, values = _series(rows, "eval/return")
    before, after = (summary[when].get("return") for when in ("before", "after"))
    if not steps.size or not (is_known(before) and is_known(after)):
        return
    steps = np.concatenate([[0], steps, [max(row["step"] for row in rows)]])
    values, low, high = (
        np.concatenate([[before[end]], middle, [after[end]]])
        for end, middle in (("mean", values), ("low", low), ("high", high))
    )
    axes.fill_between(steps, low, high, color=ORANGE, alpha=0.2, linewidth=0)
    axes.plot(steps, values, color=ORANGE, linewidth=2.2, marker="o", markersize=3.5, label="held-out prompts")
    axes.legend(frameon=False, fontsize=10, loc="best", labelcolor=INK)


def _draw_scores(axes: Axes, rows: Rows, summary: Mapping[str, Any]) -> None:
    dress(axes, "score")
    _line(axes, rows, "rollout/score", ORANGE, "score (trained on)")
    _line(axes, rows, "rollout/gold_score", GREEN, "gold score (never trained on)")
    _ends(axes, rows, summary, "score", ORANGE, "" if _series(rows, "rollout/score")[0].size else "score")
    _ends(axes, rows, summary, "gold_score", GREEN, "" if _series(rows, "rollout/gold_score")[0].size else "gold score")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=10, loc="best", labelcolor=INK)


def _draw_kl(axes: Axes, rows: Rows, summary: Mapping[str, Any]) -> None:
    dress(axes, "KL from the reference (nats per episode)")
    _line(axes, rows, "rollout/kl", PURPLE)
    _ends(axes, rows, summary, "kl", PURPLE)


def _draw_loss(axes: Axes, rows: Rows, summary: Mapping[str, Any]) -> None:
    """The loss of an agent that fits examples, beside that of the reference on them where it was recorded."""
    dress(axes, "loss", BLUE)
    _line(axes, rows, "train/loss", BLUE, "policy")
    _line(axes, rows, "train/reference_loss", MUTED, "reference")
    if _series(rows, "train/reference_loss")[0].size:
        axes.legend(frameon=False, fontsize=10, loc="best", labelcolor=INK)
    if _series(rows, "train/accuracy")[0].size:
        right = _right_axis(axes, "accuracy", ORANGE)
        _line(right, rows, "train/accuracy", ORANGE)


def _draw_length_and_entropy(axes: Axes, rows: Rows, summary: Mapping[str, Any]) -> None:
    dress(axes, "response length (tokens)", BLUE)
    axes.tick_params(axis="y", colors=BLUE)
    _line(axes, rows, "rollout/length", BLUE)
    _ends(axes, rows, summary, "length", BLUE)
    if not _series(rows, "train/entropy")[0].size:
        return
    right = _right_axis(axes, "entropy (nats per token)", ORANGE)
    _line(right, rows, "train/entropy", ORANGE)


def _right_axis(axes: Axes, title: str, color: str) -> Any:
    right = axes.twinx()
    dress(right, title, color, title_at="right")
    right.tick_params(axis="y", colors=color)
    right.grid(False)
    return right


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _line(axes: Axes, rows: Rows, name: str, color: str, label: str | None = None) -> None:
    steps, values = _series(rows, name)
    if not steps.size:
        return
    axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.3)
    axes.plot(steps, _running_mean(values), color=color, linewidth=2.2, label=label, solid_capstyle="round")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a twentieth of the curve, over what there is of the window at the ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _ends(axes: Axes, rows: Rows, summary: Mapping[str, Any], key: str, color: str, label: str = "") -> None:
    last = max([row["step"] for row in rows], default=1)  # 0 and 1: two places, where nothing was learned
    for step, when in ((0, "before"), (last, "after")):
        interval = summary[when].get(key)
        if not is_known(interval):
            continue
        mean = interval["mean"]
        errors = [[max(0.0, mean - interval["low"])], [max(0.0, interval["high"] - mean)]]
        named = label if when == "after" else ""
        axes.errorbar(
            step, mean, yerr=errors, fmt="o", label=named, color=color, markersize=6, markeredgecolor="white", capsize=3
        )


def _note(axes: Axes, height: float, text: str, above: bool) -> None:
    axes.annotate(
        text,
        xy=(0.5, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 4 if above else -4),
        textcoords="offset points",
        ha="center",
        va="bottom" if above else "top",
        fontsize=10,
        color=INK,
    )


def _label_steps(axes: Axes, rows: Rows, summary: Mapping[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if not rows:
        axes.set_xlim(-0.5, 1.5)
        axes.set_xticks([0, 1], ["reference", summary["agent"]], fontsize=10.5, color=INK)
        return
    axes.set_xlabel("env steps (tokens)", fontsize=10.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _title(figure: Figure, summary: Mapping[str, Any]) -> None:
    share = share_of_gain(summary)
    gain = ""
    if share is not None and share >= 0:
        gain = f": {share:.2f} of the optimal gain in {summary['train_seconds']:.0f} s"
    elif share is not None:
        gain = f": J = {two_decimals(summary['after']['return']['mean'])}, below the reference"
    text = f"{summary['agent']} on {problem(summary)}, seed {summary['seed']}{gain}"
    figure.suptitle(text, fontsize=13.5, color=INK, x=0.01, ha="left", fontweight="bold")
