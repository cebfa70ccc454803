"""The picture of what labels are worth: the reward model, the return and the KL over the number of labels."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agents.runs.picture_style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, blank_figure, dress
from agents.runs.worth_plan import RANDOM
from lmgym.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    figure = blank_figure(12, 4.2)
    left, middle, right = figure.subplots(1, 3)
    last = [row for row in result["rows"] if row["round"] == result["rounds"] or not row["labels"]]
    dress(left, "reward model: pairs ordered as gold does", label="labels")
    _curves(left, last, "reward_reference", BLUE, "of the reference")
    _curves(left, last, "reward_policy", ORANGE, "of the policy")
    left.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=":")
    left.legend(frameon=False, fontsize=10, labelcolor=INK)
    share = "share" if result["optimum"] is not None else "return"
    dress(middle, "share of the gain in gold return" if share == "share" else "gold return", label="labels")
    words = ("random", "by disagreement") if len(result["choices"]) > 1 else ("", "")
    _curves(middle, last, share, GREEN, *words)
    if share == "share":
        middle.axhline(1, color=INK, linewidth=1.2, linestyle="--")
    _level(middle, last, share, GREEN)
    dress(right, "KL from the reference (nats)", label="labels")
    _curves(right, last, "kl", PURPLE, "")
    _level(right, last, "kl", PURPLE)
    title = f"{result['agent']} on {result['task']}, {result['total_timesteps']:,} tokens, {len(result['seeds'])} seeds"
    figure.suptitle(title, fontsize=13.5, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def _curves(axes: Axes, rows: Rows, name: str, color: str, label: str, chosen: str = "") -> None:
    """Means over the number of labels; those by disagreement are dashed, and stand a bit to the right.

    Args:
        axes: where. rows: of the last round. name, color, label: of the curve. chosen: what the dashed one is called.
    """
    known = [row for row in rows if row["labels"] is not None and row[name] is not None]
    counts = sorted({row["labels"] for row in known})
    if not counts:
        return
    random = [row for row in known if row["choice"] == RANDOM]
    disputed = [row for row in known if row["choice"] != RANDOM]
    _curve(axes, random, name, color, label, "o-")
    _curve(axes, disputed, name, color, chosen if random else label, "s--", shift=1.12)
    axes.set_xscale("symlog", linthresh=max(1, min([count for count in counts if count], default=1)))
    axes.set_xticks(counts, [f"{count // 1000}k" if count and count % 1000 == 0 else str(count) for count in counts])
    axes.minorticks_off()
    if chosen:
        axes.legend(loc="lower right", frameon=False, fontsize=10, labelcolor=INK)


def _curve(axes: Axes, rows: Rows, name: str, color: str, label: str, fmt: str, shift: float = 1.0) -> None:
    if not rows:
        return
    positions = [row["labels"] * shift for row in rows]
    means = [row[name]["mean"] for row in rows]
    errors = [[_arm(row[name], "low") for row in rows], [_arm(row[name], "high") for row in rows]]
    axes.errorbar(positions, means, errors, fmt=fmt, color=color, label=label or None, linewidth=1.8, capsize=3)


def _level(axes: Axes, rows: Rows, name: str, color: str) -> None:
    """What a policy that was trained on the hidden score itself reached, as a line."""
    for row in rows:
        if row["labels"] is None and row[name] is not None:
            axes.axhline(row[name]["mean"], color=color, linewidth=1.2, linestyle=":", label="trained on gold")
            axes.legend(loc="lower right", frameon=False, fontsize=10, labelcolor=INK)


def _arm(interval: Mapping[str, float], end: str) -> float:
    """How far an interval reaches; 0 where that is not known, of one seed."""
    limit = interval[end]
    if limit is None or abs(limit) == float("inf"):
        return 0.0
    return abs(limit - interval["mean"])
