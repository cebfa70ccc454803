"""How a finished run is shown: a table for the terminal, a picture of the curves, and responses before and after."""

from __future__ import annotations

import io
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from agents.files import write_atomically
from agents.recorder import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Interval = Mapping[str, float]
"""`{"mean": ..., "low": ..., "high": ...}`: an estimate and its 95 % interval."""

_ROWS = {
    "return": "return",
    "score": "score",
    "sampled_score": "sampled score",
    "gold_score": "gold_score",
    "kl": "kl (nats)",
    "length": "length (tokens)",
    "normalised": "normalised",
}
_OPTIONAL = ("sampled_score", "gold_score")  # of a noisy reward, and of a task that has a gold one
_COLUMN = 18
_WIDTH = 100
_WIDE = 0.02  # of the gain: bounds of V* that are farther apart make a share uncertain, and it is said

_ROUNDING = 1e-5  # of returns that are summed in another order than the optimum
_PASSED = (
    "This is above the upper bound of V*, by more than its interval. No policy can be: either this is the one grading "
    "of 40 whose interval is too high, which another seed tells, or the bound does not hold here, and then please "
    "report it."
)

_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#8B5FBF"  # told apart by colour-blind readers too
_INK, _MUTED, _GRID = "#222222", "#6B6B6B", "#E4E4E4"


def table(summary: Mapping[str, Any]) -> str:
    """The result of a run as plain text.

    Args:
        summary: The content of `summary.json`: `before` and `after` (each a mapping from `return`, `score`,
            `sampled_score`, `gold_score`, `kl`, `length`, `normalised` to an interval or None), `optimum` (`reference`,
            `lower` and `upper`, each an interval or None; `value`, the V* of `normalised`, or None; `unknown`, why
            there is no `lower`, or None; `best_response`, a number or None; `assumption`, a text or None),
            `train_seconds`, `forward_tokens`, `backward_tokens`, `total_timesteps`, `agent`, `task`, `seed`.

    Returns:
        A heading, one row a quantity as `mean ± longer arm` of its 95 % interval ("-" where there is none, `exact`
        where it is known without sampling), the optimum, what training cost, and one sentence that grades the result.
        The sentence says how well the gain is known, where the bounds of V* are more than 2 % of it apart. Where the
        return passes the upper bound, a last line says that too.
    """
    label = max(map(len, _ROWS.values()))
    lines = [_heading(summary), "", f"{'':{label}}{'before':>{_COLUMN}}{'after':>{_COLUMN}}"]
    for key, name in _ROWS.items():
        if key in _OPTIONAL and key not in summary["after"]:
            continue
        cells = "".join(f"{_cell(summary[when].get(key)):>{_COLUMN}}" for when in ("before", "after"))
        lines.append(f"{name:{label}}{cells}".rstrip())
    lines.append("")
    optimum = summary.get("optimum") or {}
    if _known(optimum.get("reference")):
        lines.append(f"{'reference':{label}}   J_ref = {_point(optimum['reference'])}")
    for sign, bound in _optimum(summary):
        lines.append(f"{'optimum':{label}}   V* {sign} {_point(bound)}")
    if optimum.get("unknown"):
        lines.append(f"{'optimum':{label}}   V* is not known: {optimum['unknown']}")
    if optimum.get("assumption"):
        wrapped = textwrap.wrap(f"taken for granted: {optimum['assumption']}", _WIDTH - label - 3)
        lines += [f"{'':{label}}   {line}" for line in wrapped]
    best = optimum.get("best_response")
    if best is not None:
        lines.append(f"{'':{label}}   J <= {best:.2f} of a policy that is certain of every token")
    lines.append(f"{'train_seconds':{label}}   {summary['train_seconds']:.1f}")
    read = f"{summary['forward_tokens']:,} forward, {summary['backward_tokens']:,} backward"
    lines.append(f"{'tokens read':{label}}   {read}")
    sentence = _grade(summary)
    lines += ["", sentence] if sentence else []
    if passes_the_bound(summary):
        lines += textwrap.wrap(_PASSED, _WIDTH)
    return "\n".join(lines)


def passes_the_bound(summary: Mapping[str, Any]) -> bool:
    """Whether the whole interval of the return after training lies above the upper bound of V*.

    By chance that happens to one in 40 gradings of pi* itself. More often it means that the bound does not hold.
    """
    after = summary["after"].get("return")
    upper = (summary.get("optimum") or {}).get("upper")
    return _known(after) and _known(upper) and after["low"] > upper["high"] + _ROUNDING


def samples_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Responses before and after training, wrapped for a terminal of 100 columns.

    Args:
        rows: Mappings with `prompt`, `before`, `before_score`, `after`, `after_score`.
    """
    return "\n\n".join(_sample(row) for row in rows)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes indented JSON so that no reader ever sees half of it. Numbers that are not finite become null."""
    write_atomically(path, json.dumps(_finite(obj), indent=2, allow_nan=False) + "\n")


def curves(metrics_path: str | os.PathLike[str], summary: Mapping[str, Any], png_path: str | os.PathLike[str]) -> None:
    """Draws the curves of a run: return, score, KL, and length with entropy, over env steps.

    Thin lines are what each rollout measured, thick ones their running mean. Dots at both ends are the evaluations
    before and after training with their 95 % intervals; dashed lines are the bounds of the optimum.

    Args:
        metrics_path: The `metrics.jsonl` of the run.
        summary: As for `table`.
        png_path: Where the picture goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(metrics_path)
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)  # the object API: no window, no state shared with a caller's pyplot
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2, sharex=True)
    _draw_return(top_left, rows, summary)
    _draw_scores(top_right, rows, summary)
    _draw_kl(bottom_left, rows, summary)
    _draw_length_and_entropy(bottom_right, rows)
    for axes in (bottom_left, bottom_right):
        _label_steps(axes)
    _title(figure, summary)
    picture = io.BytesIO()
    figure.savefig(picture)
    write_atomically(png_path, picture.getvalue())


# --- the table ---------------------------------------------------------------------------------------------------


def _heading(summary: Mapping[str, Any]) -> str:
    steps = f"{summary['total_timesteps']:,}"
    return f"{summary['agent']} on {summary['task']}, seed {summary['seed']}, {steps} tokens (mean ± 95 % interval)"


def _cell(interval: Interval | None) -> str:
    if not _known(interval):
        return f"{'-':7}"  # under the ± of the other cells
    mean = interval["mean"]
    half_width = max(interval["high"] - mean, mean - interval["low"])
    decimals = 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    number = f"{round(mean, decimals) + 0.0:.{decimals}f}"  # no -0.000
    if half_width == 0:
        return f"{number} {'exact':7}"
    width = f"{half_width:.{decimals}f}"
    if float(width) == 0:
        width = f"{half_width:.0e}"  # small, and not nothing
    return f"{number} ± {width:5}"


def _point(interval: Interval) -> str:
    """`0.0243` of a number that is known, `0.02 [0.01, 0.03]` of an estimate."""
    mean, low, high = (interval[end] for end in ("mean", "low", "high"))
    return f"{mean:.4f}" if low == high else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _known(interval: Interval | None) -> TypeGuard[Interval]:
    # null stands in summary.json for a number that was not finite
    return interval is not None and interval["mean"] is not None and math.isfinite(interval["mean"])


def _optimum(summary: Mapping[str, Any]) -> list[tuple[str, Interval]]:
    """The known bounds of V*, each with its sign; one "=" where the two coincide, as on tasks solved exactly."""
    optimum = summary.get("optimum") or {}
    lower, upper = optimum.get("lower"), optimum.get("upper")
    if _known(lower) and _known(upper) and lower["mean"] == upper["mean"]:
        return [("=", lower)]
    return [(sign, bound) for sign, bound in ((">=", lower), ("<=", upper)) if _known(bound)]


def _grade(summary: Mapping[str, Any]) -> str:
    """`J = 1.10 of V* >= 1.25: 0.88 of the gain`, or nothing where the optimum is unknown.

    Where the 1 of the share lies within the bounds it says so: `V* ~ 1.27`.
    """
    after, optimum = summary["after"].get("return"), _optimum(summary)
    if not _known(after) or not optimum:
        return ""
    sign, bound = optimum[0]
    best = bound["mean"]
    value = summary["optimum"].get("value")
    if value is not None and value != best:
        sign = "~"
        best = value
    sentence = f"J = {after['mean']:.2f} of V* {sign} {best:.2f}"
    share = _share_of_gain(summary)
    if share is None:
        return sentence
    width = _width(summary)
    known = f", and the gain is known to within {100 * width:.1f} %" if width > _WIDE else ""
    return f"{sentence}: {share:.2f} of the gain{known}"


def _width(summary: Mapping[str, Any]) -> float:
    """How far the bounds of V* are apart, as a share of the gain (`StoredOptimum.width`); 0 where one is not known."""
    optimum = summary.get("optimum") or {}
    lower, upper = optimum.get("lower"), optimum.get("upper")
    reference = optimum.get("reference") or summary["before"].get("return")
    if not (_known(lower) and _known(upper) and _known(reference)):
        return 0.0
    value = optimum.get("value")
    gain = (lower["mean"] if value is None else value) - reference["mean"]
    return (upper["mean"] - lower["mean"]) / gain if gain > 0 else 0.0


def _share_of_gain(summary: Mapping[str, Any]) -> float | None:
    """(J - J_ref) / (V* - J_ref), as evaluated if the summary has it; an upper estimate where V* is a lower bound."""
    normalised = summary["after"].get("normalised")
    if _known(normalised):
        return normalised["mean"]
    optimum = summary.get("optimum") or {}
    before, after = optimum.get("reference") or summary["before"].get("return"), summary["after"].get("return")
    lower = optimum.get("lower")
    if not (_known(before) and _known(after) and _known(lower)):
        return None
    value = optimum.get("value")
    gain = (lower["mean"] if value is None else value) - before["mean"]
    return (after["mean"] - before["mean"]) / gain if gain > 0 else None


# --- responses ---------------------------------------------------------------------------------------------------


def _sample(row: Mapping[str, Any]) -> str:
    lines = [_wrapped("prompt", row["prompt"])]
    lines += [_wrapped(f"{when:6} {row[f'{when}_score']:+7.2f}", row[when]) for when in ("before", "after")]
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> str:
    # A model may emit anything, terminal escapes included.
    printable = "".join(character if character.isprintable() else " " for character in text)
    indent = 17
    return textwrap.fill(
        " ".join(printable.split()) or "(empty)",
        width=_WIDTH,
        initial_indent=f"{label:{indent}}",
        subsequent_indent=" " * indent,
    )


def _finite(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return obj


# --- the picture -------------------------------------------------------------------------------------------------


def _draw_return(axes: Axes, rows: list[dict[str, Any]], summary: Mapping[str, Any]) -> None:
    _dress(axes, "return per episode")
    _line(axes, rows, "rollout/return", _BLUE)
    reference = (summary.get("optimum") or {}).get("reference") or summary["before"].get("return")
    if _known(reference):
        axes.axhline(reference["mean"], color=_MUTED, linewidth=1.2, linestyle=":")
        _note(axes, reference["mean"], f"reference {reference['mean']:.2f}", above=False)
    bounds = _optimum(summary)
    for _, bound in bounds:
        axes.axhspan(bound["low"], bound["high"], color=_INK, alpha=0.08, linewidth=0)
        axes.axhline(bound["mean"], color=_INK, linewidth=1.2, linestyle="--")
    if len(bounds) == 2:  # one note, for the two may lie on each other
        lower, upper = bounds[0][1], bounds[1][1]
        axes.axhspan(lower["mean"], upper["mean"], color=_INK, alpha=0.08, linewidth=0)
        _note(axes, upper["high"], f"optimum V* {lower['mean']:.2f} to {upper['mean']:.2f}", above=True)
    elif bounds:
        sign, bound = bounds[0]
        glyph = {">=": "\N{GREATER-THAN OR EQUAL TO}", "<=": "\N{LESS-THAN OR EQUAL TO}"}.get(sign, sign)
        _note(axes, bound["high"], f"optimum V* {glyph} {bound['mean']:.2f}", above=True)
    _ends(axes, rows, summary, "return", _BLUE)
    axes.margins(y=0.12)


def _draw_scores(axes: Axes, rows: list[dict[str, Any]], summary: Mapping[str, Any]) -> None:
    _dress(axes, "score")
    _line(axes, rows, "rollout/score", _ORANGE, "score (trained on)")
    _line(axes, rows, "rollout/gold_score", _GREEN, "gold score (never trained on)")
    _ends(axes, rows, summary, "score", _ORANGE)
    _ends(axes, rows, summary, "gold_score", _GREEN)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=10, loc="best", labelcolor=_INK)


def _draw_kl(axes: Axes, rows: list[dict[str, Any]], summary: Mapping[str, Any]) -> None:
    _dress(axes, "KL from the reference (nats per episode)")
    _line(axes, rows, "rollout/kl", _PURPLE)
    _ends(axes, rows, summary, "kl", _PURPLE)


def _draw_length_and_entropy(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _dress(axes, "response length (tokens)", _BLUE)
    axes.tick_params(axis="y", colors=_BLUE)
    _line(axes, rows, "rollout/length", _BLUE)
    if not _series(rows, "train/entropy")[0].size:
        return
    right = axes.twinx()
    _dress(right, "entropy (nats per token)", _ORANGE, title_at="right")
    right.tick_params(axis="y", colors=_ORANGE)
    right.grid(False)
    _line(right, rows, "train/entropy", _ORANGE)


def _dress(axes: Axes, title: str, color: str = _INK, title_at: str = "left") -> None:
    axes.set_title(title, loc=title_at, fontsize=11.5, color=color, pad=8)  # type: ignore[arg-type]
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(labelsize=10, colors=_MUTED, length=0)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _line(axes: Axes, rows: list[dict[str, Any]], name: str, color: str, label: str | None = None) -> None:
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


def _ends(axes: Axes, rows: list[dict[str, Any]], summary: Mapping[str, Any], key: str, color: str) -> None:
    last = max([row["step"] for row in rows], default=summary["total_timesteps"])
    for step, when in ((0, "before"), (last, "after")):
        interval = summary[when].get(key)
        if not _known(interval):
            continue
        mean = interval["mean"]
        errors = [[max(0.0, mean - interval["low"])], [max(0.0, interval["high"] - mean)]]
        axes.errorbar(step, mean, yerr=errors, fmt="o", color=color, markersize=6, markeredgecolor="white", capsize=3)


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
        color=_INK,
    )


def _label_steps(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("env steps (tokens)", fontsize=10.5, color=_INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _title(figure: Figure, summary: Mapping[str, Any]) -> None:
    share = _share_of_gain(summary)
    gain = "" if share is None else f": {share:.2f} of the optimal gain in {summary['train_seconds']:.0f} s"
    text = f"{summary['agent']} on {summary['task']}, seed {summary['seed']}{gain}"
    figure.suptitle(text, fontsize=13.5, color=_INK, x=0.01, ha="left", fontweight="bold")
