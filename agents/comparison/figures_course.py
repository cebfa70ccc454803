"""Learning curves: the share of the gain over steps and over seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.comparison.figures import Look, Panel, file_name, label_axes, new_axes
from agents.comparison.figures_scores import FEWEST, LOWEST, SHARE
from agents.comparison.scales import optimum_of
from agents.comparison.series import GRADED
from agents.comparison.study import SEED, Study
from agents.comparison.table import Run
from agents.runs.picture_style import INK, MUTED
from lmgym.scores import Band, ScoreCurves, efficiency_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOCKS = {"step": "env steps (tokens sampled)", "seconds": "seconds of training"}
HELD_OUT = "gradings on held-out prompts"
BATCHES = "training batches"
_POINTS = 32
_FAR_APART = 4.0  # times: then a logarithmic axis shows all
_RESAMPLES = 400  # of a band that is drawn and not read off
_BATCH_RETURN = "rollout/return"


def source_of(runs: Sequence[Run]) -> str:
    """What the curves of some runs are of: gradings along the way, if all runs with a curve have them."""
    learned = [run for run in runs if _BATCH_RETURN in run.series or run.is_graded_along]
    return HELD_OUT if learned and all(run.is_graded_along for run in learned) else BATCHES


def draw_curves(study: Study, looks: Mapping[str, Look]) -> list[Panel]:
    """Two panels a task, over steps and over seconds."""
    panels = []
    for number, task in enumerate(study.tasks):
        runs = [run for run in study.table.finished if run.task == task]
        if all(optimum_of(run.summary) is None for run in runs):
            continue
        source = source_of(runs)
        for clock, name in CLOCKS.items():
            figure, axes = new_axes(f"{task}, {source}")
            bands = curves_of(study, task, clock, source)
            _draw(axes, study, task, clock, bands, looks)
            label_axes(axes, name, SHARE)
            ends = "; ".join(f"{label} {band.value[-1]:.2f}" for label, band in bands.items())
            alt = f"Share of the gain on {task} over {name}, of {source}; the curves end at: {ends}."
            shown = {label: looks[label] for label in study.labels if study.table.of(label, task)}
            file = f"{file_name('curves', number, task)}-{clock}"
            panels.append(Panel(file, figure, alt, legend=shown))
    return panels


def curves_of(study: Study, task: str, clock: str, source: str) -> dict[str, Band]:
    """The interquartile mean over seeds along training, with its band, by label; without agents that have no curve."""
    found: dict[str, Band] = {}
    for label in study.labels:
        curves = {run.seed: _curve(run, clock, source) for run in study.table.of(label, task)}
        known = {seed: curve for seed, curve in curves.items() if curve is not None and len(curve[0]) > 2}
        if not known:
            continue
        columns: dict[str, list[float]] = {"clock": [], "score": [], "seed": []}
        for seed, (times, shares) in known.items():
            columns["clock"] += times.tolist()
            columns["score"] += shares.tolist()
            columns["seed"] += [0 if seed is None else seed] * len(times)
        names = [label] * len(columns["clock"])
        scores = ScoreCurves.from_columns(
            label=names,
            task=[task] * len(names),
            seed=[int(seed) for seed in columns["seed"]],
            clock=columns["clock"],
            score=columns["score"],
        )
        start, end = scores.common_range(label)
        if start < end:
            grid = np.linspace(start, end, _POINTS)
            rng = np.random.default_rng(SEED)
            found |= efficiency_curves(scores, grid=grid, rng=rng, resamples=_RESAMPLES)
    return found


def _curve(run: Run, clock: str, source: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Times and shares of the gain of one run; batches as a running mean over a twentieth of the run."""
    scale = optimum_of(run.summary)
    series = run.series.get(GRADED if source == HELD_OUT else _BATCH_RETURN)
    if scale is None or series is None:
        return None
    reference, optimum = scale
    times = getattr(series, clock).astype(float)
    shares = (series.value - reference.mean) / (optimum.value - reference.mean)
    if source == BATCHES:
        shares = running_mean(shares)
    known = np.isfinite(times) & np.isfinite(shares)
    times, first = np.unique(times[known], return_index=True)
    return times, shares[known][first]


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The centred mean over a twentieth of the values, over what there is of it at the ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _draw(
    axes: Axes, study: Study, task: str, clock: str, bands: Mapping[str, Band], looks: Mapping[str, Look]
) -> None:
    lowest = 0.0
    for label, band in bands.items():
        look = looks[label]
        if len(study.table.of(label, task)) >= FEWEST:
            axes.fill_between(band.at, band.low, band.high, color=look.color, alpha=0.12, linewidth=0, gid=look.gid)
        axes.plot(band.at, band.value, color=look.color, linestyle=look.dash, linewidth=1.7, gid=look.gid)
        lowest = min(lowest, float(band.value.min()))
    earliest, latest = _time_limits(study, task, clock, bands)
    for label in study.labels:
        end = study.cell(label, task)
        if end is None:
            continue
        look = looks[label]
        at = float(np.clip(_end_of(study, label, task, clock), earliest, latest))
        height = max(LOWEST, end.mean)
        if label not in bands:  # it learns nothing, or recorded nothing: its result is a line
            axes.plot([earliest, latest], [height, height], color=look.color, linewidth=1, linestyle=":", gid=look.gid)
        axes.plot(at, height, marker=look.marker, color=look.color, markersize=5.5, clip_on=False, gid=look.gid)
        lowest = min(lowest, height)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
    axes.set_ylim(max(LOWEST, lowest) - 0.03, 1.06)
    axes.set_xlim(earliest, latest + 0.02 * (latest - earliest))
    _label_times(axes, earliest)


def _end_of(study: Study, label: str, task: str, clock: str) -> float:
    """When the runs of a label ended, on average."""
    ends = {"step": "total_timesteps", "seconds": "train_seconds"}
    return float(np.mean([run.summary[ends[clock]] for run in study.table.of(label, task)]))


def _time_limits(study: Study, task: str, clock: str, bands: Mapping[str, Band]) -> tuple[float, float]:
    """The ends of the time axis: steps from 0 on; seconds from 0 on, or logarithmic where ends lie far apart."""
    ends = [float(band.at[-1]) for band in bands.values()]
    ends = ends or [_end_of(study, label, task, clock) for label in study.labels if study.table.of(label, task)]
    latest = max(ends)
    if clock == "step" or latest <= _FAR_APART * min(ends):
        return 0.0, latest
    return max(latest / 1000, min([min(ends) / 10, *(float(band.at[0]) for band in bands.values())])), latest


def _label_times(axes: Axes, earliest: float) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    if earliest > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
