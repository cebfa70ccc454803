"""How the figures of the report look, and how they are written: inline SVG for the page, SVG and PNG as files."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.runs.picture_style import GRID, INK, MUTED, blank_figure
from lmgym.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by colour-blind readers, and 3 : 1 against white; in the dark the page has lighter ones of the same hue.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#4b3fb5", "#2b8cbe", "#7a4a2b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "8", "d", "H")
DASHES = ("-", "--", "-.", ":")
WIDTH = 4.4  # inches: a panel is as wide as a telephone
_SANS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Look:
    """How a label is drawn wherever it appears."""

    number: int
    color: str
    marker: str
    dash: Any

    @property
    def gid(self) -> str:
        """The name of its artists, by which the page finds them."""
        return f"label-{self.number}"


@dataclass(frozen=True)
class Panel:
    """One figure.

    Attributes:
        name: of its files. figure: drawn. alt: what it shows, for who does not see it. wide: as wide as the page.
        legend: labels whose looks the files explain; on the page one legend serves all panels.
    """

    name: str
    figure: Figure
    alt: str
    wide: bool = False
    legend: Mapping[str, Look] = field(default_factory=dict)


def looks_of(labels: Sequence[str]) -> dict[str, Look]:
    """A colour, a marker and a dash for every label, in order."""
    return {
        label: Look(i, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], DASHES[i // len(COLORS) % len(DASHES)])
        for i, label in enumerate(labels)
    }


def plain_texts() -> Any:
    """In this context a text that is drawn has no formulas: a "$" in the name of a run is a character."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False})


def file_name(kind: str, number: int, task: str) -> str:
    """The name of the figure of a kind for one of the tasks: letters, digits and hyphens."""
    return f"{kind}-{number + 1}-{re.sub(r'[^A-Za-z0-9.]+', '-', task).strip('-')}"


def new_axes(title: str, width: float = WIDTH, height: float = 3.1) -> tuple[Figure, Axes]:
    """A figure with one dressed pair of axes."""
    figure = blank_figure(width, height)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=7)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(labelsize=9.5, colors=MUTED, length=0)
    return figure, axes


def label_axes(axes: Axes, x: str = "", y: str = "") -> None:
    """Says what the axes are."""
    axes.set_xlabel(x, fontsize=9.5, color=MUTED)
    axes.set_ylabel(y, fontsize=9.5, color=MUTED)


def inline_svg(panel: Panel) -> str:
    """A panel as an element of a page: colours are variables of the page, ids its own, texts text."""
    svg = _saved(panel, "svg", None).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _without_ids(svg, panel.name)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", lambda match: f"font: {match[1]}{_SANS}".replace('"', "'"), svg)
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {_SANS}", svg)
    for name, color in _variables().items():
        svg = re.sub(color, f"var(--{name})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is enough
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    assert size is not None
    head = f'role="img" aria-label="{_attribute(panel.alt)}" style="max-width: {float(size[1]) * 1.75:.0f}px"'
    svg = svg.replace(size[0], head, 1)
    return re.sub(r"\s*\n\s*", "\n", svg).replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)


def write_panel(panel: Panel, directory: Path, command: str) -> None:
    """Writes `<name>.svg` and `<name>.png`, with a legend and the command in their metadata."""
    if panel.legend:
        with plain_texts():
            _add_legend(panel)
    write_atomically(directory / f"{panel.name}.svg", _saved(panel, "svg", {"Description": command, "Date": None}))
    panel.figure.set_layout_engine("none")  # it stays as it is in the other file
    write_atomically(directory / f"{panel.name}.png", _saved(panel, "png", {"Description": command}))


def legend_marker(look: Look) -> str:
    """A label's line and marker as a small SVG."""
    from matplotlib.lines import Line2D

    figure = blank_figure(0.5, 0.2)
    line = Line2D([0.1, 0.9], [0.5, 0.5], color=look.color, linestyle=look.dash, linewidth=1.8)
    figure.add_artist(line)
    figure.add_artist(Line2D([0.5], [0.5], color=look.color, marker=look.marker, markersize=6, linestyle=""))
    svg = inline_svg(Panel(f"key-{look.number}", figure, ""))
    return svg.replace('role="img" aria-label=""', 'aria-hidden="true" class="key"', 1)


def _saved(panel: Panel, kind: str, metadata: Mapping[str, Any] | None) -> bytes:
    import matplotlib

    file = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if metadata is None else dict(metadata)
    with plain_texts(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.name}):
        panel.figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def _add_legend(panel: Panel) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=x.color, marker=x.marker, linestyle=x.dash, linewidth=1.8, label=name, markersize=5)
        for name, x in panel.legend.items()
    ]
    width, height = panel.figure.get_size_inches()
    across = max(1, int(width / (0.7 + 0.085 * max(map(len, panel.legend)))))
    panel.figure.set_size_inches(width, height + 0.22 * -(-len(handles) // across) + 0.1)
    legend = panel.figure.legend(handles=handles, loc="outside lower left", ncols=across, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(INK)


def _variables() -> dict[str, str]:
    """The colours of the figures by the names that the page's style gives them."""
    named = {f"c{i}": color for i, color in enumerate(COLORS)}
    return named | {"ink": INK, "muted": MUTED, "grid": GRID, "card": "#ffffff"}


def _without_ids(svg: str, name: str) -> str:
    """Keeps the ids that are referred to, under names no other figure has; those of labels become classes."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))

    def renamed(match: re.Match[str]) -> str:
        if match[1].startswith("label-"):
            return f' class="{match[1]}"'
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r' id="([^"]+)"', renamed, svg)
    return re.sub(r"(url\(#|xlink:href=\"#)", lambda match: f"{match[1].replace('xlink:', '')}{name}-", svg)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
