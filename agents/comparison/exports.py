"""The results in the shapes of other tools: rliable, marl-eval, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.comparison.series import GRADED
from agents.comparison.study import Study
from agents.comparison.table import Run, Table
from lmgym.files import write_atomically
from lmgym.intervals import Interval

_METRICS = ("return", "normalised", "score", "kl")


def write_exports(study: Study, out: Path) -> None:
    """Writes `rliable.json`, `marl_eval.json`, `runs.csv` and `results.tex` into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    scores = {label: matrix.tolist() for label, matrix in to_rliable(study).items()}
    write_atomically(out / "rliable.json", json.dumps(scores, indent=1))
    write_atomically(out / "marl_eval.json", json.dumps(to_marl_eval(study.table), indent=1))
    write_atomically(out / "runs.csv", to_csv(study.table))
    write_atomically(out / "results.tex", to_latex(study))


def to_rliable(study: Study) -> dict[str, NDArray[np.float64]]:
    """rliable's score dictionary: label to (runs, tasks), of the labels and tasks that can be compared.

    rliable wants as many runs on every task: where there are more, those of the highest seeds are left out.
    """
    matrix = study.matrix
    if matrix is None:
        return {}
    found = {}
    for label in matrix.labels:
        cells = [list(matrix.cell(label, task).values()) for task in matrix.tasks]
        runs = min(map(len, cells))
        found[label] = np.array([cell[:runs] for cell in cells]).T
    return found


def to_marl_eval(table: Table) -> dict[str, Any]:
    """marl-eval's raw data: environment, task, algorithm, run, step; every grading on held-out prompts is a step.

    Its tools want as many runs and gradings everywhere (its `DiagnoseData` says where they are not).
    """
    tasks: dict[str, Any] = {}
    for run in table.finished:
        runs = tasks.setdefault(run.task, {}).setdefault(run.label, {})
        runs[f"seed_{run.seed}"] = _marl_run(run)
    return {"lmgym": tasks}


def _marl_run(run: Run) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    graded = run.series[GRADED]
    for i, step in enumerate(graded.step.tolist()):
        row: dict[str, Any] = {"step_count": step, "elapsed_time": float(graded.seconds[i])}
        for metric in _METRICS:
            series = run.series.get(f"eval/{metric}")
            at = [] if series is None else series.value[series.step == step].tolist()
            if at:
                row[metric] = at
        steps[f"step_{i}"] = row
    last = {name: value for name, value in row.items() if name in _METRICS}
    return {**steps, "absolute_metrics": last}


def to_csv(table: Table) -> str:
    """A line a run: its state and what it ended with."""
    file = io.StringIO()
    columns = ["run", "agent", "label", "task", "seed", "state", *_METRICS, "train_seconds", "total_timesteps"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for run in table.runs:
        graded = [run.graded(metric) for metric in _METRICS]
        numbers = ["" if interval is None else interval.mean for interval in graded]
        cost = [run.summary.get(name, "") for name in ("train_seconds", "total_timesteps")]
        names = [_inert(x) for x in (run.name, run.agent, run.label, run.task)]
        writer.writerow([*names, run.seed, run.state, *numbers, *cost])
    return file.getvalue()


def _inert(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def to_latex(study: Study) -> str:
    r"""A booktabs table of the shares of the gain: `\usepackage{booktabs}`."""
    heads = ["agent", "mean", *study.tasks]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", _line([_tex(head) for head in heads])]
    lines.append(r"\midrule")
    for label in study.labels:
        cells = [study.aggregates.get("mean", {}).get(label), *(study.cell(label, task) for task in study.tasks)]
        lines.append(_line([_tex(label), *map(_tex_interval, cells)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex_interval(interval: Interval | None) -> str:
    if interval is None:
        return "--"
    half = max(interval.high - interval.mean, interval.mean - interval.low)
    return f"${interval.mean:.3f}$" if math.isinf(half) else rf"${interval.mean:.3f} \pm {half:.3f}$"


def _tex(text: str) -> str:
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(named.get(x, f"\\{x}" if x in "&%$#_{}" else x) for x in text)
