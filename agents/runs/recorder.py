"""What a training run writes: `metrics.jsonl`, a tracker's scalars, and a progress bar while it runs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agents.runs.trackers import TrackerConfig, start
from lmgym.files import RunFileError, open_to_append, read_text, refuse_link, write_atomically

GROUPS = ("rollout/", "train/", "cost/", "time/", "eval/")
METRICS_FILE = "metrics.jsonl"
_SHOWN = {"rollout/return": "return", "rollout/score": "score", "rollout/kl": "kl", "train/loss": "loss"}
_SHOWN |= {"eval/accuracy": "held-out accuracy"}
_BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Recorder:
    """Writes the metrics of one run and shows how far it is.

    Every row goes, as one JSON object a line, to `<directory>/metrics.jsonl`: `{"step": 4096, "rollout/return": 0.81,
    ...}`; and to a tracker (`agents.runs.trackers`). The progress bar counts env steps
    (tokens) and shows return, score, KL (nats per episode), tokens per second and the time left.

    Use it as a context manager, so that the files are closed when training is interrupted.

    Args:
        directory: The run directory; made if it does not exist.
        total: The env step at which training ends.
        resume_at: The env step a resumed run goes on from. Rows past it were written after the checkpoint was, will
            be written again, and are dropped here. None starts a new run.
        progress: False shows no bar.
        unit: what the bar counts; where it is not tokens, steps are of something else.
        tracker: Where rows go besides; None is TensorBoard (`<directory>/tensorboard`).

    Raises:
        ValueError: If `total` is not positive or `resume_at` is not in `[0, total]`.
        FileExistsError: If a new run would mix its metrics with those of an earlier one.
        RunFileError: If a row is damaged, or a link lies where a file is to be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        total: int,
        resume_at: int | None = None,
        progress: bool = True,
        unit: str = "tok",
        tracker: TrackerConfig | None = None,
    ) -> None:
        if total <= 0:
            raise ValueError(f"`total` must be a positive number of env steps, got {total}.")
        if resume_at is not None and not 0 <= resume_at <= total:
            raise ValueError(f"`resume_at` must be an env step between 0 and {total}, got {resume_at}.")
        self.directory = Path(directory)
        self.path = self.directory / METRICS_FILE
        self.directory.mkdir(parents=True, exist_ok=True)
        refuse_link(self.path)
        if resume_at is not None:
            _drop_rows_after(self.path, resume_at)
        elif self.path.exists() and self.path.stat().st_size:
            raise FileExistsError(
                f"`{self.path}` holds the metrics of an earlier run: pass `resume_at` to go on with it, "
                "or choose another `directory`."
            )
        self._tracker = start(tracker or TrackerConfig(), self.directory, resume_at)
        self._file = open_to_append(self.path)
        self._bar = _progress_bar(total, resume_at or 0, progress, unit)
        self._shown: dict[str, str] = {}

    def record(self, step: int, metrics: Mapping[str, float], *, seconds: float | None = None) -> None:
        """Writes one row.

        Args:
            step: Env steps (tokens) so far in the whole run.
            metrics: Name to value; a name starts with `rollout/`, `train/`, `cost/`, `time/` or `eval/`. A value that
                is not finite is written as null to `metrics.jsonl`, since JSON has no word for it.
            seconds: Of training so far, which a grading along the way has as `time`.

        Raises:
            ValueError: If a name is outside the vocabulary.
        """
        unknown = [name for name in metrics if not name.startswith(GROUPS)]
        if unknown:
            raise ValueError(f"Names in `metrics` must start with one of {', '.join(GROUPS)}; got {unknown}.")
        values = {name: float(value) for name, value in metrics.items()}
        row: dict[str, float | int | None] = {"step": int(step)}
        if seconds is not None:
            row["time"] = seconds
        row.update((name, value if math.isfinite(value) else None) for name, value in values.items())
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if seconds is not None:  # the tokens are those of the batch, which is written already
            values = {name: value for name, value in values.items() if name.startswith("eval/")}
        self._tracker.log(step, values)
        self._advance(step, values)

    def close(self) -> None:
        """Closes the files and the bar; a second call does nothing. Of an agent that learns nothing no bar is left."""
        self._bar.leave = bool(self._bar.n)
        self._bar.close()
        self._tracker.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _advance(self, step: int, values: Mapping[str, float]) -> None:
        shown = {label: round(values[name], 3) + 0.0 for name, label in _SHOWN.items() if name in values}
        self._shown.update((label, f"{x:.3g}") for label, x in shown.items())
        self._bar.set_postfix(self._shown, refresh=False)
        # The last batch may overshoot the budget; a bar past its total forgets the total.
        self._bar.update(max(0, min(step, self._bar.total) - self._bar.n))


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`.

    A last line that a killed process left half written is not a row. Any other broken line is an error.

    Raises:
        RunFileError: If a line before the last is not a JSON object of numbers with a `step`, or it is no text file.
    """
    lines = read_text(Path(path)).split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last line break is what was not finished
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_row(row):
            raise RunFileError(
                f"Line {number} of `{path}` is not a row of metrics: {line.strip()[:80]!r}. Take that line out."
            )
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether it maps names to numbers or None, `step` to an int."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return False
    return all(value is None or type(value) in (int, float) for value in row.values())


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def grading_bar(total: int, progress: bool = True) -> Any:
    """A bar that counts the episodes of a grading, and goes away when it is through; with `progress=False` none."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc="grading",
        unit="ep",
        disable=not progress,
        leave=False,
        dynamic_ncols=True,
        mininterval=_seconds_between(),
    )


def _progress_bar(total: int, initial: int, progress: bool, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=initial,
        disable=not progress,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        bar_format=_BAR_FORMAT,
        mininterval=_seconds_between(),
    )


def _seconds_between() -> float:
    """How often a bar is drawn anew: in a log file every time is one more line."""
    return 0.1 if sys.stderr.isatty() else 10.0
