"""Processes that take run after run, and keep what they have imported.

One that dies is a failed run, and another takes its place. They end with the process that started them, killed or not:
a run is then stopped after its batch, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from agents.comparison.directories import ERROR_FILE, SUMMARY
from agents.runs.directory import CHECKPOINT, CONFIG_FILE, write_config
from agents.runs.lock import Lock
from agents.runs.signals import Stoppable
from agents.runs.surroundings import prepare_process
from lmgym.errors import LmGymError
from lmgym.files import RunFileError, write_atomically

LOG = "log.txt"
INTERRUPTED = 130
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_SECONDS_FOR_THE_LOCK = 60.0  # a process of a comparison that was killed ends its batch first


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        values: the config. directory: of the run; None where the config is checked alone.
        command: that makes the same run alone.
    """

    values: dict[str, Any]
    directory: Path | None = None
    command: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a job: an exit code as of `agents.train`, and what went wrong, or ""."""

    code: int
    error: str = ""


class Worker:
    """One process, as it is seen from outside."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._lifeline, lifeline = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, lifeline), daemon=True)
        with _one_thread():
            self._process.start()
        theirs.close()
        lifeline.close()
        self.job: Job | None = None
        self._is_interrupted = False

    def give(self, job: Job) -> None:
        """Has it do a job."""
        self.job = job
        with contextlib.suppress(OSError):  # it has died: `answer` says so
            self.connection.send(job)

    def answer(self) -> Answer | None:
        """What came of its job; None as long as it is at it."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            return self._last_words()
        return None if self._process.is_alive() else self._last_words()

    def _last_words(self) -> Answer:
        self._process.join()
        if self._is_interrupted:  # perhaps after its job, before it could answer
            return Answer(INTERRUPTED)
        code = self._process.exitcode or 0
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = f"the process died of {reason}"
        if self.job is not None:
            note_error(self.job, error)
        return Answer(code or 1, error)

    @property
    def is_alive(self) -> bool:
        """Whether it can be given a job."""
        return self._process.is_alive()

    def interrupt(self) -> None:
        """The first time it stops after its batch, with a checkpoint; the second time at once."""
        self._is_interrupted = True
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGINT)

    def end(self) -> None:
        """Ends the process; one that is at a job is killed."""
        if self.job is None and self._process.is_alive():
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self._process.join(5)
        self._process.kill()
        self._process.join()
        self.connection.close()
        self._lifeline.close()


def wait_for(workers: Sequence[Worker], seconds: float) -> None:
    """Returns when one of them has something to say, or after so many seconds."""
    wait([worker.connection for worker in workers], seconds)


def note_error(job: Job, error: str) -> None:
    """Leaves in a run directory what ended the run, and of which run that is, where something can be left there."""
    if job.directory is None:
        return
    with contextlib.suppress(OSError):
        job.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(job.directory / ERROR_FILE, f"{error}\n")
        if not any((job.directory / name).exists() for name in (CONFIG_FILE, SUMMARY, CHECKPOINT)):
            write_config(job.directory, job.values)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that are started in the block compute with one thread each."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# -- within the process ----------------------------------------------------------------------------------------------


def _work(connection: Connection, lifeline: Connection) -> None:
    """Does jobs until there are no more."""
    if hasattr(os, "setpgid"):  # Ctrl-C reaches the process that started it, which passes it on
        os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    prepare_process()
    try:
        import torch

        torch.set_num_threads(1)
        while True:
            job = connection.recv()
            if job is None:
                return
            connection.send(_do(job))
            torch.cuda.empty_cache()
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _end_with(lifeline: Connection) -> None:
    """Stops this process when the one at the other end is gone."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os.kill(os.getpid(), signal.SIGTERM)


def _do(job: Job) -> Answer:
    if job.directory is None:
        return _check(job.values)
    try:
        job.directory.mkdir(parents=True, exist_ok=True)
        return _do_here(job, job.directory)
    except OSError as error:  # the directory or its log cannot be written
        return Answer(1, str(error))


def _do_here(job: Job, directory: Path) -> Answer:
    """Does a job; what it prints goes to a file in the directory."""
    with _writing_to(directory / LOG):
        try:
            return _run(job, directory)
        except KeyboardInterrupt:
            return Answer(INTERRUPTED)
        except BaseException as error:
            traceback.print_exc()
            found = str(error) if isinstance(error, LmGymError) else traceback.format_exception_only(error)[-1]
            found = found.strip().splitlines()[0] if found.strip() else type(error).__name__
            note_error(job, found)
            return Answer(1, found)
        finally:
            gc.collect()  # models that are held in cycles


def _check(values: dict[str, Any]) -> Answer:
    from agents.runs.plan import check

    try:
        check(values)
    except LmGymError as error:
        return Answer(1, str(error))
    return Answer(0)


def _run(job: Job, directory: Path) -> Answer:
    """Begins a run, or goes on with it where there is a checkpoint."""
    from agents.checkpoint import newest
    from agents.runs.run import begin, go_on
    from agents.runs.trust import needed_trust

    with Stoppable():
        _wait_until_free(directory)
        if newest(directory / CHECKPOINT) is None:
            code = begin(job.values, directory, job.command)
        else:
            code = go_on(directory, [], needed_trust(job.values))
    if code == 0:
        (directory / ERROR_FILE).unlink(missing_ok=True)
    return Answer(code)


def _wait_until_free(directory: Path) -> None:
    """Waits for a process of a comparison that was killed: it is about to end."""
    until = time.monotonic() + _SECONDS_FOR_THE_LOCK
    while True:
        try:
            with Lock(directory):
                return
        except RunFileError:
            if time.monotonic() > until:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    """What is printed in the block, by whatever, goes to the end of a file."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
