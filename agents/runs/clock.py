"""The clock of training: it stands still while a policy is graded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds since it was started, without those in which it was stopped. Agents that train together share one."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Starts anew, from 0."""
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The block takes no time."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - before
