"""Runs that are missing: finished ones are skipped, interrupted ones go on, and a failed one stops no other."""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Sequence

from agents.comparison.live import FAILED, INTERRUPTED, RUNNING, WAITING, Plain, Row, make_display
from agents.comparison.plan import Cell, labels_of
from agents.comparison.workers import INTERRUPTED as STOPPED
from agents.comparison.workers import Answer, Job, Worker, wait_for
from agents.runs.signals import Stops
from lmgym.errors import InvalidArgumentError

_SECONDS_BETWEEN_LOOKS = 1.0
_SIGNALS_TO_KILL = 3  # the first two are passed on


class Sweep:
    """Runs cells on worker processes.

    Args:
        cells: the runs. workers: how many processes.

    Attributes:
        rows: a row a cell, with what came of it.
        is_stopped: whether Ctrl-C or SIGTERM has ended it before all runs were through.
    """

    def __init__(self, cells: Sequence[Cell], workers: int) -> None:
        self.rows = [Row(cell, label) for cell, label in zip(cells, labels_of(cells), strict=True)]
        self.is_stopped = False
        for row in self.rows:
            if row.cell.is_finished:
                row.finish()
        self._waiting = deque(row for row in self.rows if row.state == WAITING)
        self._count = min(workers, len(self._waiting))
        self._workers: dict[Worker, Row | None] = {}

    @property
    def failed(self) -> list[Row]:
        """The runs that have failed here."""
        return [row for row in self.rows if row.state == FAILED]

    def run(self) -> None:
        """Runs what is missing.

        Raises:
            InvalidArgumentError: for a config that cannot be; no run is started then.
        """
        if not self._waiting:
            return
        with Stops() as stops:
            try:
                for _ in range(self._count):
                    self._workers[Worker()] = None
                self._check(stops)
                with make_display(self.rows, self._count) as display:
                    self._loop(display, stops)
            finally:
                for worker in self._workers:
                    worker.end()

    def _check(self, stops: Stops) -> None:
        """Has the workers check every config in full, which takes torch."""
        distinct = {(row.cell.setting, row.cell.task): row.cell for row in self._waiting}
        waiting = deque(distinct.values())
        asked: dict[Worker, Cell] = {}
        wrong: list[str] = []
        while (waiting or asked) and not stops.count:
            for worker in [worker for worker in self._workers if worker not in asked]:
                if waiting:
                    asked[worker] = waiting.popleft()
                    worker.give(Job(asked[worker].values))
            wait_for(list(self._workers), _SECONDS_BETWEEN_LOOKS)
            for worker, cell in list(asked.items()):
                answer = worker.answer()
                if answer is not None:
                    worker.job = None
                    del asked[worker]
                    if answer.code:
                        wrong.append(f"{cell.setting} on {cell.task}: {answer.error}")
        if wrong:
            raise InvalidArgumentError("\n".join(wrong))

    def _loop(self, display: Plain, stops: Stops) -> None:
        passed_on = 0
        while True:
            if not stops.count:
                self._give_jobs()
            elif stops.count > passed_on:
                passed_on = stops.count
                self._pass_on(passed_on)
            if not any(self._workers.values()):
                break
            wait_for(list(self._workers), _SECONDS_BETWEEN_LOOKS)
            display.update(self._look())
        self.is_stopped = any(row.state in (WAITING, INTERRUPTED) for row in self.rows)

    def _pass_on(self, count: int) -> None:
        """Passes Ctrl-C on to the runs."""
        if count == 1:
            print("\nStopping every run after its batch, with a checkpoint (Ctrl-C again to stop at once).", flush=True)
        for worker, row in self._workers.items():
            if row is not None and count < _SIGNALS_TO_KILL:
                worker.interrupt()
            elif row is not None:
                row.state = INTERRUPTED
                self._workers[worker] = None

    def _give_jobs(self) -> None:
        for worker, row in list(self._workers.items()):
            if row is not None or not self._waiting:
                continue
            if not worker.is_alive:
                worker.end()
                del self._workers[worker]
                worker = Worker()
            row = self._workers[worker] = self._waiting.popleft()
            row.state = RUNNING
            row.started = time.monotonic()
            command = shlex.join(["python", "-m", "agents.train", *row.cell.arguments])
            worker.give(Job(row.cell.values, row.cell.directory, command))

    def _look(self) -> list[Row]:
        """Takes up what has happened; returns the runs that have ended."""
        ended = []
        for worker, row in self._workers.items():
            if row is None:
                continue
            answer = worker.answer()
            if answer is None:
                row.look()
                continue
            worker.job = None
            self._workers[worker] = None
            _take(row, answer)
            ended.append(row)
        return ended


def _take(row: Row, answer: Answer) -> None:
    row.seconds = time.monotonic() - row.started
    if answer.code == 0 and row.cell.is_finished:
        row.finish()
    elif answer.code == STOPPED:
        row.state = INTERRUPTED
        row.look()
    else:
        row.state = FAILED
        row.error = answer.error or "it left no summary.json"
