"""What `python -m agents.compare` does: checks everything, runs what is missing, and reports."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agents.comparison.directories import find_runs
from agents.comparison.plan import Cell, check_distinct, make_cells, settings_of
from agents.comparison.protocol import Request, read_request
from agents.comparison.record import write_protocol
from agents.comparison.sequential import rule_of, run_until_decided
from agents.comparison.sweep import Sweep
from agents.comparison.tuning import Search, begin_search
from agents.runs.command_line import shell_command
from agents.runs.directory import CONFIG_FILE
from agents.runs.lock import Lock
from lmgym.errors import InvalidArgumentError

if TYPE_CHECKING:
    from agents.comparison.sensitivity import Sensitivity
    from agents.comparison.verdict import Rule

TUNING = ".tuning"  # hidden, so that no glob takes its runs for reported ones
_STOPPED = 130
_WIDTH = 118  # of a terminal


def compare(arguments: Sequence[str]) -> int:
    """Runs the command with its arguments; returns the exit code: 1 where a run has failed, 130 after Ctrl-C.

    Raises:
        LmGymError: for what cannot be; no run is started then.
    """
    request = read_request(arguments)
    command = shell_command("agents.compare", *arguments)
    protocol = request.protocol
    others = find_runs(request.runs) if request.runs else []
    seeds = protocol.seeds if protocol.max_seeds is None else range(protocol.max_seeds)
    cells = make_cells(protocol, settings_of(protocol), seeds, request.out)
    check_distinct(cells)
    search = begin_search(protocol, request.out / TUNING) if protocol.tune else None
    _make_directory(request.out)
    with Lock(request.out):
        if cells:
            write_protocol(request, command)
        rule = None
        tuning: Sequence[Sensitivity] = ()
        if protocol.max_seeds is not None:
            ended = run_until_decided(protocol, cells, lambda some: run_cells(some, request, command))
            code = ended.code
            cells = ended.cells
            rule = None if ended.found is None else rule_of(ended.found, protocol)
        elif search is None:
            code = run_cells(cells, request, command)
        else:
            code = _tune(search, cells, request, command)
            if code != _STOPPED:
                tuning = search.found(cells)
                search.write(tuning, request.out)
            cells = _distinct([*cells, *search.tuned])
        if code != _STOPPED:
            _report([*(cell.directory for cell in cells), *others], request, command, rule, tuning)
    return code


def _make_directory(out: Path) -> None:
    """Raises `InvalidArgumentError` where the results cannot go there."""
    if (out / CONFIG_FILE).is_file():
        raise InvalidArgumentError(f"`out` must be the directory of a comparison, and {out} is that of a run.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"`out` must be a directory that can be made, got {out}: {error.strerror}."
        ) from None


def _tune(search: Search, cells: Sequence[Cell], request: Request, command: str) -> int:
    """Searches, and runs what won on the reported seeds."""
    code = run_cells(search.cells, request, command)
    if code == _STOPPED:
        return code
    search.choose(request.protocol, request.out)
    return max(code, run_cells(_distinct([*cells, *search.tuned, *search.tuned_by_task]), request, command))


def run_cells(cells: Sequence[Cell], request: Request, command: str) -> int:
    """Runs what is missing; returns the exit code."""
    sweep = Sweep(cells, request.workers or cores())
    sweep.run()
    for row in sweep.failed:
        print(f"{row} failed: {row.error} ({row.cell.directory / 'log.txt'})", file=sys.stderr)
    if sweep.is_stopped:
        print(f"Stopped. Go on with: {command}", flush=True)
        return _STOPPED
    return 1 if sweep.failed else 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Those of directories of their own: what two searches have chosen may be the same run."""
    return list({cell.directory: cell for cell in reversed(list(cells))}.values())[::-1]


def _report(
    directories: Sequence[Path], request: Request, command: str, rule: Rule | None, tuning: Sequence[Sensitivity]
) -> None:
    """Writes the report, and prints the results and the verdict."""
    from agents.comparison.report import REPORT, write_study
    from agents.comparison.sensitivity import sensitivity_text
    from agents.comparison.study import study_of
    from agents.comparison.table import read_runs
    from agents.comparison.terminal import results_table
    from agents.comparison.verdict import find_verdict

    table = read_runs([path for path in directories if path.is_dir()])
    print(f"\n{results_table(table)}\n", flush=True)
    if tuning:
        print(f"{sensitivity_text(tuning)}\n", flush=True)
    study = study_of(table, tuning)
    for sentence in find_verdict(study, rule).sentences:
        print(textwrap.fill(sentence, _WIDTH, break_on_hyphens=False))
    write_study(study, request.out, command, rule)
    print(f"\n{request.out / REPORT}", flush=True)
