"""The picture of an anatomy: the gap by step, the entropies, the gap by prompt and step, and the worst states."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agents.runs.anatomy_report import STATES, Numbers, share_of, state_text, token_text
from agents.runs.picture_style import BLUE, GREEN, INK, MUTED, ORANGE, blank_figure, dress
from lmgym.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "anatomy.png"
_PROMPTS = 16  # rows of the heat map, those with the largest gaps
_TEXT = 44  # characters of a state


def draw_anatomy(found: Numbers, path: Path) -> None:
    """Draws the content of `anatomy.json`."""
    picture = io.BytesIO()
    figure_of(found).savefig(picture)
    write_atomically(path, picture.getvalue())


def figure_of(found: Numbers) -> Figure:
    """The picture of the content of `anatomy.json`."""
    gap = found["gap"]
    figure = blank_figure(11, 7.4)
    grid = figure.subplots(2, 2, width_ratios=[1, 1.15])
    _draw_steps(grid[0, 0], gap)
    _draw_entropies(grid[1, 0], gap)
    _draw_states(grid[0, 1], gap)
    _draw_prompts(grid[1, 1], gap)
    text = f"{found['agent']} on {found['task']}, seed {found['seed']}, after {found['step']:,} tokens: "
    text += f"V* - J = {gap['gap']['mean']:.3f}"
    figure.suptitle(text, fontsize=13.5, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure


def _draw_steps(axes: Axes, gap: Numbers) -> None:
    dress(axes, "share of the gap, by step", label="tokens before")
    steps = np.arange(len(gap["by_step"]))
    means = np.array([part["mean"] for part in gap["by_step"]])
    lows = np.array([part["low"] for part in gap["by_step"]])
    highs = np.array([part["high"] for part in gap["by_step"]])
    axes.bar(steps, means, color=BLUE, width=0.7)
    if (highs > lows).any():
        axes.errorbar(steps, means, yerr=[means - lows, highs - means], fmt="none", ecolor=INK, elinewidth=1)
    axes.set_ylim(bottom=0)
    _count_steps(axes, len(steps))


def _draw_entropies(axes: Axes, gap: Numbers) -> None:
    dress(axes, "entropy at the states visited (nats a token)", label="tokens before")
    steps = np.arange(len(gap["by_step"]))
    for name, color, marker, label in (
        ("entropy", ORANGE, "o", "the policy"),
        ("optimal_entropy", GREEN, "s", "pi*, at the same states"),
    ):
        values = np.array([np.nan if x is None else x for x in gap[name]])
        axes.plot(steps, values, color=color, marker=marker, markersize=5, linewidth=2, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    _count_steps(axes, len(steps))


def _draw_states(axes: Axes, gap: Numbers) -> None:
    from matplotlib.ticker import MaxNLocator

    dress(axes, "the states with the largest shares, and the token too likely there")
    states = gap["states"][:STATES]
    shares = [state["share"]["mean"] for state in states]
    heights = np.arange(len(states))
    axes.barh(heights, shares, color=BLUE, height=0.62)
    axes.invert_yaxis()
    axes.set_yticks(heights, [state_text(state, _TEXT).replace("$", r"\$") for state in states], fontsize=8.5)
    axes.set_xlim(0, 1.9 * max(shares, default=1.0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    for height, state, share in zip(heights, states, shares, strict=True):
        text = f"{share_of(share, gap)}: {token_text(state['too_likely'])}"
        axes.annotate(
            text.replace("$", r"\$"),
            xy=(share, height),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=MUTED,
        )
    axes.grid(visible=False, axis="y")


def _draw_prompts(axes: Axes, gap: Numbers) -> None:
    shares = np.array(gap["by_prompt"])
    worst = np.argsort(-shares.sum(1), kind="stable")[:_PROMPTS]
    more = f", the {len(worst)} worst of {len(shares)}" if len(shares) > len(worst) else ""
    dress(axes, f"the gap by prompt and step{more}", label="tokens before")
    image = axes.imshow(shares[worst], aspect="auto", cmap="cividis", vmin=0)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.ax.tick_params(labelsize=9, colors=MUTED, length=0)
    bar.outline.set_visible(False)
    axes.set_yticks(np.arange(len(worst)), [str(i) for i in worst])
    axes.set_ylabel("prompt", fontsize=10, color=MUTED)
    axes.grid(False)
    _count_steps(axes, shares.shape[1])


def _count_steps(axes: Axes, steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlim(-0.6, steps - 0.4)
