"""What training costs: its seconds, and the most memory that it holds at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")  # Linux: a "5" sets the peak of the resident memory back to what there is now


@dataclass(frozen=True)
class Cost:
    """What the training of a run has taken, in all of its processes.

    Attributes:
        seconds: of training. peak_memory_bytes: the most at a time; None where the system does not say.
    """

    seconds: float
    peak_memory_bytes: int | None


class PeakMemory:
    """The most memory that training holds at a time; what is held while it is paused does not count.

    On a GPU it is what torch allocates there. On a CPU it is the resident memory of the process, Python and torch
    included. A process may have done other runs before. Where the system cannot take back the peak of a process (Linux
    can), that of a later run is known only if it is the highest.

    Args:
        device: of the policy.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self._gpu = device if getattr(device, "type", device) == "cuda" else None
        self._peak: int | None = None
        self._floor = 0  # a peak of the process that is older than this part of the training
        self.start()

    def start(self) -> None:
        """Starts anew."""
        self._peak = None
        self._go_on()

    def read(self) -> int | None:
        """Bytes, at the most so far; None where that is not known."""
        self._take()
        return self._peak

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the block holds does not count."""
        self._take()
        try:
            yield
        finally:
            self._go_on()

    def _take(self) -> None:
        now = self._gpu_peak() if self._gpu is not None else _resident_peak()
        if now is not None and now > self._floor:
            self._peak = max(now, self._peak or 0)

    def _go_on(self) -> None:
        if self._gpu is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._gpu)
        else:
            self._floor = 0 if _take_back_peak() else _resident_peak() or 0

    def _gpu_peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated(self._gpu)


def highest(*peaks: int | None) -> int | None:
    """The highest peak of several parts of a training; None where that of one part is not known."""
    known = [peak for peak in peaks if peak is not None]
    return max(known) if len(known) == len(peaks) else None


def _take_back_peak() -> bool:
    """Sets the peak of the resident memory back to what there is now; returns whether that could be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    """The highest resident memory of this process since its peak was taken back, in bytes."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
