"""What `python -m agents.worth` does: begins a run or goes on with one, cell by cell, and reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from agents.runs.command_line import shell_command
from agents.runs.directory import CELLS, empty_again, new_run, resumed_run, write_config
from agents.runs.plan import plain
from agents.runs.report import write_json
from agents.runs.run import versions
from agents.runs.signals import Interrupt
from agents.runs.trust import trust_argument
from agents.runs.worth_plan import (
    CHANGEABLE,
    WORTH_FILES,
    Cell,
    WorthPlan,
    check_worth,
    saved_worth_values,
)
from agents.runs.worth_report import cell_line, write_worth
from lmgym.files import RunFileError, read_json


def begin_worth(cfg: DictConfig, directory: Path) -> int:
    """A new run; returns its exit code.

    Raises:
        LmGymError: for a config that cannot be, or a directory that holds a run; no file is left.
    """
    with empty_again(directory):
        values = plain(cfg)
        values.pop("resume")
        plan = check_worth(values)
        check_task(plan)
        with new_run(directory, values, WORTH_FILES):
            write_json(directory / "versions.json", versions())
            return WorthRun(plan, directory, values).measure()


def go_on_with_worth(directory: Path, overrides: Sequence[str], trusted: Sequence[str]) -> int:
    """A run that goes on; returns its exit code.

    Args:
        directory: of the run. overrides: `key=value` each. trusted: modules that the config may import.

    Raises:
        LmGymError: for one that cannot.
    """
    with resumed_run(directory, WORTH_FILES):
        values = saved_worth_values(directory, overrides, trusted)
        for name in ("resume", "trust"):
            values.pop(name, None)
        plan = check_worth(values)
        run = WorthRun(plan, directory, values)
        run.check_cells()
        check_task(plan)
        write_config(directory, values)
        return run.measure()


def check_task(plan: WorthPlan) -> None:
    """Raises `LmGymError` where there are labels and no reward model can start from the task's reference."""
    from lmgym.reward_models.starting import check_reference
    from lmgym.tasks import make_task

    if any(plan.labels):
        name = str(plan.training.settings["task"])
        check_reference(name, make_task(name).reference("cpu"), "task=reviews, or task=proxy")


class WorthRun:
    """One run: its plan, and its directory with a file a cell.

    Args:
        plan: what to do. directory: of the run. values: of its config.
    """

    def __init__(self, plan: WorthPlan, directory: Path, values: Mapping[str, Any]) -> None:
        self.plan = plan
        self.directory = directory
        self.values = values
        self._config = {name: value for name, value in values.items() if name not in CHANGEABLE}

    def measure(self) -> int:
        """Measures what is not there yet, and reports; returns the exit code, 130 after Ctrl-C."""
        command = shell_command("agents.worth", f"resume={self.directory}") + trust_argument(self.plan.training.trust)
        missing = [cell for cell in self.plan.cells() if not self._path(cell).is_file()]
        try:
            with Interrupt() as stop:
                for number, cell in enumerate(missing, 1):
                    content = self._run(cell, stop)
                    if content is None:
                        print(f"Stopped after {number - 1} of {len(missing)} parts. Go on with: {command}")
                        return 130
                    print(cell_line(content, number, len(missing)), flush=True)
                write_worth(self.plan, self.directory, self.read_cells())
        except KeyboardInterrupt:
            print(f"\nStopped at once. The parts that are finished are kept. Go on with: {command}", file=sys.stderr)
            raise
        return 0

    def read_cells(self) -> list[dict[str, Any]]:
        """The contents of all cells of the plan, which are there."""
        return [read_json(self._path(cell)) for cell in self.plan.cells()]

    def check_cells(self) -> None:
        """Raises `RunFileError` where a cell was measured with another config than the run now has."""
        for cell in self.plan.cells():
            path = self._path(cell)
            if path.is_file():
                before = read_json(path).get("config")
                if before != self._config:
                    raise RunFileError(f"`{path}` was measured with another config than the run has now: remove it.")

    def _run(self, cell: Cell, stop: Interrupt) -> dict[str, Any] | None:
        """Measures a cell and writes its file; None where that was stopped."""
        from agents.runs.worth_cell import Stopped, World, run_cell

        started = time.perf_counter()
        try:
            rows = run_cell(World.of(self.plan, lambda: not stop.asked), cell)
        except Stopped:
            return None
        seconds = time.perf_counter() - started
        content = {**asdict(cell), "rounds": rows, "seconds": seconds, "config": self._config}
        self._path(cell).parent.mkdir(exist_ok=True)
        write_json(self._path(cell), content)
        return content

    def _path(self, cell: Cell) -> Path:
        return self.directory / CELLS / f"{cell.name}.json"
