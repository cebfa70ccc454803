"""Run directories as one table: `pandas.read_parquet("results.parquet")` reads it.

The tidy table has a row a run, step and metric. The second table, `runs.parquet`, has a row a run: its state, what it
cost, and its config, packages, command, commit and machine as JSON.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agents.comparison.directories import ERROR_FILE, find_runs, read_run_config, read_summary
from agents.comparison.names import agent_name, find_labels, own_task, problem_name
from agents.comparison.scales import interval_of, regraded
from agents.comparison.series import GRADED, Series, read_series
from agents.runs.directory import VERSIONS
from agents.runs.origin import ORIGIN
from agents.runs.recorder import METRICS_FILE, read_rows
from lmgym.errors import LmGymError
from lmgym.files import RunFileError, read_json, read_text, replace_file
from lmgym.intervals import Interval

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("run", "agent", "label", "task", "seed", "step", "seconds", "tokens", "metric", "value")
FINISHED = "finished"
UNFINISHED = "unfinished"
FAILED = "failed"
REPEATED = "repeated"  # another finished run has the same config and seed


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: what tells it from the others: the end of its path.
        directory: of the run.
        agent: as on a command line. label: that, with what was varied.
        task: the problem it was graded on, with what was changed of a registered task.
        seed: of the run. state: "finished", "unfinished", "failed" or "repeated". error: what ended it, or "".
        config: as it was resolved. summary: `summary.json` on the scale known now; empty where it has none.
        origin: `packages`, `command`, `commit` and `machine`, where they were recorded.
        series: by metric.
    """

    name: str
    directory: Path
    agent: str
    label: str
    task: str
    seed: int | None
    state: str
    error: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether its result counts."""
        return self.state == FINISHED

    def graded(self, metric: str, when: str = "after") -> Interval | None:
        """A metric of the grading before or after training, such as `return` or `normalised`."""
        return interval_of(self.summary.get(when, {}).get(metric))

    @property
    def is_graded_along(self) -> bool:
        """Whether it was graded on the held-out prompts while it trained, and not only at both ends."""
        return GRADED in self.series and len(self.series[GRADED].step) > 2


@dataclass(frozen=True)
class Table:
    """Runs, in the order in which they were named."""

    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """Those whose results count."""
        return tuple(run for run in self.runs if run.finished)

    def tasks(self) -> list[str]:
        """The problems of the finished runs, in order."""
        return list(dict.fromkeys(run.task for run in self.finished))

    def labels(self) -> list[str]:
        """Those of the finished runs, in order."""
        return list(dict.fromkeys(run.label for run in self.finished))

    def of(self, label: str, task: str) -> list[Run]:
        """The finished runs of an agent on a task, by seed."""
        found = [run for run in self.finished if run.label == label and run.task == task]
        return sorted(found, key=lambda run: -1 if run.seed is None else run.seed)

    def to_arrow(self) -> pyarrow.Table:
        """The tidy table, with the columns `COLUMNS`."""
        import pyarrow as pa

        pieces = [(i, metric, series) for i, run in enumerate(self.runs) for metric, series in run.series.items()]
        lengths = [len(series.step) for _, _, series in pieces]
        of_run = np.repeat([i for i, _, _ in pieces], lengths).astype(np.int32)
        columns = {"run": _by_index(of_run, [run.name for run in self.runs])}
        for name in ("agent", "label", "task"):
            columns[name] = _by_index(of_run, [getattr(run, name) for run in self.runs])
        seeds = pa.array([run.seed for run in self.runs], pa.int64())
        columns["seed"] = seeds.take(pa.array(of_run))
        for name, kind in (("step", pa.int64()), ("seconds", pa.float64()), ("tokens", pa.float64())):
            columns[name] = pa.array(_joined([getattr(series, name) for _, _, series in pieces]), kind)
        metrics = list(dict.fromkeys(metric for _, metric, _ in pieces))
        numbers = {metric: i for i, metric in enumerate(metrics)}
        columns["metric"] = _by_index(np.repeat([numbers[m] for _, m, _ in pieces], lengths).astype(np.int32), metrics)
        columns["value"] = pa.array(_joined([series.value for _, _, series in pieces]), pa.float64())
        return pa.table({name: columns[name] for name in COLUMNS})

    def runs_to_arrow(self) -> pyarrow.Table:
        """The table of runs: a row a run."""
        import pyarrow as pa

        rows = [_row_of_run(run) for run in self.runs]
        columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in _run_columns().items()}
        return pa.table(columns)

    def write(self, out: Path) -> None:
        """Writes `results.parquet` and `runs.parquet` into a directory."""
        import pyarrow.parquet

        for name, table in (("results", self.to_arrow()), ("runs", self.runs_to_arrow())):
            with replace_file(out / f"{name}.parquet") as file:
                pyarrow.parquet.write_table(table, file, compression="zstd")


# -- reading ---------------------------------------------------------------------------------------------------------


def read_runs(directories: Sequence[str | os.PathLike[str]]) -> Table:
    """Reads runs, finished or not.

    Args:
        directories: of runs, folders of runs, or globs, as `find_runs` takes them.

    Raises:
        InvalidArgumentError: where one of them holds no run.
    """
    paths = find_runs(directories)
    names = _short_names(paths)
    configs = list(map(_config_or_nothing, paths))
    whole = [config for config in configs if "agent" in config]
    labels = iter(find_labels(whole))
    runs = []
    for path, name, config in zip(paths, names, configs, strict=True):
        label = next(labels) if "agent" in config else "?"
        runs.append(_read_run(path, name, config, label))
    return Table(tuple(_mark_repeated(runs)))


def _read_run(path: Path, name: str, config: dict[str, Any], label: str) -> Run:
    """One run. What is damaged makes a failed run of it, which says what is."""
    seed = config.get("seed")
    empty = Run(
        name=name,
        directory=path,
        agent=agent_name(config) if config else "?",
        label=label,
        task=problem_name(config) if config else "?",
        seed=seed if isinstance(seed, int) else None,
        state=FAILED,
        config=config,
    )
    try:
        if not config:
            read_run_config(path)
        summary = regraded(read_summary(path), own_task(config))
        rows = read_rows(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else []
        origin = _read_origin(path)
    except LmGymError as error:
        return replace(empty, error=_last_line(path) or str(error))
    ended_by = "" if summary else _last_line(path)
    state = FAILED if ended_by else UNFINISHED
    return replace(
        empty,
        state=FINISHED if summary else state,
        error=ended_by,
        summary=summary,
        origin=origin,
        series=read_series(rows, summary),
    )


def _config_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return read_run_config(path)
    except RunFileError:
        return {}


def _read_origin(path: Path) -> dict[str, Any]:
    origin: dict[str, Any] = {}
    if (path / VERSIONS).is_file():
        origin["packages"] = read_json(path / VERSIONS)
    if (path / ORIGIN).is_file():
        origin |= read_json(path / ORIGIN)
    return origin


def _last_line(path: Path) -> str:
    """What ended a run of a sweep: the last line of its `error.txt`."""
    if not (path / ERROR_FILE).is_file():
        return ""
    lines = [line.strip() for line in read_text(path / ERROR_FILE).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _mark_repeated(runs: Sequence[Run]) -> list[Run]:
    """Counts a finished run once: a copy of it is no other seed."""
    seen: Counter[tuple[str, str, int | None]] = Counter()
    marked = []
    for run in runs:
        key = (run.label, run.task, run.seed)
        repeated = run.finished and seen[key] > 0
        seen[key] += run.finished
        marked.append(replace(run, state=REPEATED) if repeated else run)
    return marked


# -- what Arrow holds ------------------------------------------------------------------------------------------------


def _by_index(indices: NDArray[np.int32], values: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(values, pa.string()))


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.array([])


def _run_columns() -> dict[str, Any]:
    import pyarrow as pa

    texts = ("run", "agent", "label", "task", "state", "error", "directory")
    numbers = ("return", "normalised", "normalised_low", "normalised_high", "kl", "score", "train_seconds")
    counts = ("seed", "total_timesteps", "forward_tokens", "backward_tokens", "peak_memory_bytes")
    columns = {name: pa.string() for name in texts}
    columns |= {name: pa.float64() for name in numbers} | {name: pa.int64() for name in counts}
    return columns | {name: pa.string() for name in ("config", "packages", "command", "commit", "machine")}


def _row_of_run(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(run, name) for name in ("agent", "label", "task", "seed", "state", "error")}
    row |= {"run": run.name, "directory": str(run.directory)}
    for name in ("return", "normalised", "kl", "score"):
        interval = run.graded(name)
        row[name] = None if interval is None else interval.mean
        row |= {f"{name}_low": None if interval is None else interval.low}
        row |= {f"{name}_high": None if interval is None else interval.high}
    for name in ("train_seconds", "total_timesteps", "forward_tokens", "backward_tokens", "peak_memory_bytes"):
        row[name] = run.summary.get(name, run.origin.get(name))
    row["config"] = json.dumps(run.config, default=str)
    row["packages"] = json.dumps(run.origin.get("packages"))
    row["machine"] = json.dumps(run.origin.get("machine"))
    return row | {name: run.origin.get(name) for name in ("command", "commit")}
