"""How a sweep is shown while it runs: one table of all runs on a terminal, and a line a run in a file."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.comparison.plan import Cell
from agents.runs.recorder import METRICS_FILE
from lmgym.files import read_json

WAITING = "waiting"
RUNNING = "running"
FINISHED = "finished"
FAILED = "failed"
INTERRUPTED = "interrupted"
_LAST_BYTES = 8192  # of a file of metrics: its last row is in there
_COLOURS = {WAITING: "bright_black", RUNNING: "yellow", FINISHED: "green", FAILED: "red", INTERRUPTED: "magenta"}


@dataclass
class Row:
    """A run, and how far it is.

    Attributes:
        cell: the run. label: what it is called. state: one of the five above. error: what ended it.
        result: its share of the gain or its return. seconds: that it took here. started: the clock then.
    """

    cell: Cell
    label: str
    state: str = WAITING
    error: str = ""
    result: str = ""
    seconds: float = math.nan
    started: float = 0.0
    share: float = field(default=0.0)

    def __str__(self) -> str:
        return f"{self.label} on {self.cell.problem}, seed {self.cell.seed}"

    def look(self) -> None:
        """Reads how far a running one is."""
        step = last_step(self.cell.directory / METRICS_FILE)
        self.share = min(1.0, step / self.cell.values["total_timesteps"])

    def finish(self) -> None:
        """Takes up what a finished run has reached."""
        self.state = FINISHED
        self.share = 1.0
        self.result = result_of(read_json(self.cell.directory / "summary.json"))


def result_of(summary: Mapping[str, Any]) -> str:
    """The share of the gain, or the return where V* is not known."""
    normalised = summary["after"].get("normalised")
    if normalised is not None and normalised["mean"] is not None:
        return f"{normalised['mean']:.3f}"
    value = summary["after"]["return"]["mean"]
    return "J = nan" if value is None else f"J = {value:.3f}"


def last_step(path: Path) -> int:
    """The step of the last whole row of a file of metrics; 0 where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LAST_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def seconds_left(rows: Sequence[Row], workers: int) -> float | None:
    """How long the rest takes, from how long runs of the same label and task took, or else any; None before the first.

    Args:
        rows: all runs. workers: that share the rest.
    """
    known = [row for row in rows if row.state == FINISHED and math.isfinite(row.seconds)]
    if not known:
        return None
    left = 0.0
    longest = 0.0
    for row in rows:
        if row.state not in (WAITING, RUNNING):
            continue
        alike = [x.seconds for x in known if (x.cell.setting, x.cell.task) == (row.cell.setting, row.cell.task)]
        alike = alike or [x.seconds for x in known if x.cell.task == row.cell.task] or [x.seconds for x in known]
        of_row = (1 - row.share) * sum(alike) / len(alike)
        left += of_row
        longest = max(longest, of_row)
    return max(left / workers, longest)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Plain:
    """A line whenever a run ends."""

    def __init__(self, rows: Sequence[Row], workers: int) -> None:
        self._rows = rows
        self._workers = workers

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, ended: Sequence[Row] = ()) -> None:
        """After something has happened: runs may have ended."""
        done = sum(row.state in (FINISHED, FAILED) for row in self._rows)
        for row in ended:
            result = row.result if row.state == FINISHED else f"{row.state} {row.error}".strip()
            left = seconds_left(self._rows, self._workers)
            more = f", {duration(left)} left" if left else ""
            took = f" in {duration(row.seconds)}" if math.isfinite(row.seconds) else ""
            print(f"[{done}/{len(self._rows)}] {row}: {result}{took}{more}", flush=True)


class Live(Plain):
    """A table with a line for every label and task, and a cell for every seed; drawn anew every second."""

    def __init__(self, rows: Sequence[Row], workers: int) -> None:
        super().__init__(rows, workers)
        import rich.live

        self._started = time.monotonic()
        self._screen = rich.live.Live(auto_refresh=False, vertical_overflow="ellipsis")

    def __enter__(self) -> Live:
        self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.update(self._draw(), refresh=True)
        self._screen.stop()

    def update(self, ended: Sequence[Row] = ()) -> None:
        """After something has happened, or a second."""
        self._screen.update(self._draw(), refresh=True)

    def _draw(self) -> Any:
        import rich.table

        done = sum(row.state in (FINISHED, FAILED) for row in self._rows)
        left = seconds_left(self._rows, self._workers)
        more = f", about {duration(left)} left" if left else ""
        title = f"{done} of {len(self._rows)} runs, {duration(time.monotonic() - self._started)}{more}"
        seeds = sorted({row.cell.seed for row in self._rows})
        table = rich.table.Table(
            "agent", "task", *(f"seed {seed}" for seed in seeds), title=title, title_justify="left"
        )
        lines: dict[tuple[str, str], dict[int, Row]] = {}
        for row in self._rows:
            lines.setdefault((row.label, row.cell.problem), {})[row.cell.seed] = row
        for (label, problem), by_seed in lines.items():
            table.add_row(label, problem, *(_cell(by_seed.get(seed)) for seed in seeds))
        return table


def _cell(row: Row | None) -> Any:
    import rich.text

    if row is None:
        return ""
    texts = {WAITING: ".", RUNNING: f"{row.share:.0%}", FINISHED: row.result}
    return rich.text.Text(texts.get(row.state, row.state), style=_COLOURS[row.state])


def make_display(rows: Sequence[Row], workers: int) -> Plain:
    """A table where somebody watches, lines elsewhere."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            return Live(rows, workers)
        except ImportError:  # rich is not installed
            pass
    return Plain(rows, workers)
