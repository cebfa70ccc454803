"""How the pictures of all commands look: colours, a blank figure, and axes without a frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by colour-blind readers too.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#8B5FBF"
INK = "#222222"
MUTED = "#6B6B6B"
GRID = "#E4E4E4"


def blank_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)  # the object API: no window, no state shared with a caller's pyplot
    return figure


def dress(axes: Axes, title: str, color: str = INK, title_at: str = "left", label: str | None = None) -> None:
    """Gives axes a title and a grid, and takes their frame.

    Args:
        axes: what is dressed. title: above it. color, title_at: of the title. label: below it.
    """
    axes.set_title(title, loc=title_at, fontsize=11.5, color=color, pad=8)  # type: ignore[arg-type]
    if label is not None:
        axes.set_xlabel(label, fontsize=10, color=MUTED)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(labelsize=10, colors=MUTED, length=0)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Puts what is drawn in axes into a legend below the figure."""
    handles = axes.get_legend_handles_labels()
    where = "outside lower center"
    figure.legend(*handles, loc=where, ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK)  # type: ignore[call-overload]
