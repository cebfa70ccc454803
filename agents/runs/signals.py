"""Ctrl-C, and SIGTERM, by which a cluster asks for its machine: both mean the same."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class _Handling:
    """Has a method handle both signals while a block runs. In another thread than the main one it does nothing."""

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Stoppable(_Handling):
    """Either signal raises KeyboardInterrupt: what was begun is taken back, and nobody sees a traceback."""


class Interrupt(_Handling):
    """The first signal asks for a stop after the batch in hand, for a checkpoint of a whole one; the second stops."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._put_back()
        self.asked = True
        print("\nStopping after this batch, with a checkpoint (Ctrl-C again to stop at once).", file=sys.stderr)


class Stops(_Handling):
    """Counts the signals; who asks for the number acts on them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
