"""The peak of memory is of training alone: what came before it, and gradings in between, do not count."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import agents.runs.cost
from agents.runs.cost import PeakMemory, highest

MIB = 2**20
LARGE = 200 * MIB
can_take_back = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def hold(size: int) -> None:
    """Holds so much for a moment; the system takes it back at once."""
    assert len(bytes(size).replace(b"\0", b"\1", 1)) == size


@can_take_back
def test_what_the_process_held_before_does_not_count() -> None:
    hold(LARGE)
    memory = PeakMemory()
    before = memory.read()
    assert before is not None
    assert PeakMemory().read() == pytest.approx(before, abs=20 * MIB)
    hold(LARGE)
    after = memory.read()
    assert after is not None
    assert after - before > LARGE // 2
    memory.start()
    assert memory.read() == pytest.approx(before, abs=20 * MIB)


@can_take_back
def test_a_grading_does_not_count() -> None:
    memory = PeakMemory()
    before = memory.read()
    with memory.paused():
        hold(LARGE)
    assert memory.read() == pytest.approx(before, abs=20 * MIB)


def test_where_the_peak_cannot_be_taken_back_only_a_higher_one_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([500, 500, 500, 700, 700, 900, 900])
    monkeypatch.setattr(agents.runs.cost, "_take_back_peak", lambda: False)
    monkeypatch.setattr(agents.runs.cost, "_resident_peak", lambda: next(peaks))
    memory = PeakMemory()
    memory.start()
    assert memory.read() is None  # another run had 500: this one is anywhere below
    with memory.paused():  # 700 before it, which is this run's; 700 after it
        pass
    assert memory.read() == 900
    assert memory.read() == 900


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_the_peak_of_a_process_is_known_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = agents.runs.cost._resident_peak()
    monkeypatch.setattr(agents.runs.cost, "_STATUS", tmp_path / "status")
    without = agents.runs.cost._resident_peak()
    assert there is not None
    assert without is not None
    assert without > there / 2  # of all its life, where the other may have been taken back
    assert without < 100 * there


def test_a_run_that_went_on_had_the_highest_of_its_parts() -> None:
    assert highest(3, 5) == highest(5, 3) == 5
    assert highest(None, 5) is None


def test_on_a_gpu_it_is_what_torch_allocated_there(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = {"now": 5, "peak": 900}  # 900 of a run before

    def reset(device: torch.device) -> None:
        allocated["peak"] = allocated["now"]

    def hold_there(size: int) -> None:
        allocated["peak"] = max(allocated["peak"], size)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    memory = PeakMemory(torch.device("cuda"))
    hold_there(70)
    with memory.paused():
        hold_there(800)
    hold_there(60)
    assert memory.read() == 70
