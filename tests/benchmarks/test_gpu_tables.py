"""What the measurements on a GPU print, and that each of them runs without one."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import run_command_here

from benchmarks import gpu, gpu_train
from benchmarks.gpu import LIMITS, measure, run_parts
from benchmarks.gpu_models import Setting
from benchmarks.gpu_tables import markdown

SMALL = Setting("cpu", is_small=True)
ABOUT = {"device": "a card", "torch": "2", "transformers": "5", "date": "2026-01-01"}


def test_the_tables_of_what_was_measured() -> None:
    step = {"model": "m", "batch": 2, "horizon": 8, "bytes_a_step": 100.0, "flops_a_step": 10.0}
    results: dict[str, Any] = {
        "machine": ABOUT,
        "command": "--small",
        "limits": [{"bytes_per_second": 1000.0, "flops_per_second": 1000.0}],
        "decode": [
            step | {"path": "collect", "tokens_per_second": 5.0},
            step | {"path": "generate", "tokens_per_second": 2.0},
            step | {"path": "continuous", "error": "RuntimeError: no room"},
        ],
        "errors": {"ppo": "out of memory"},
    }
    text = markdown(results)
    # The floor of a step is 100 bytes at 1,000 bytes/s: 2 tokens in 0.1 s.
    assert "| m | 2 | 20 | 5 | 0.25 | 2 | 2.50 |  |  |" in text
    assert "- m, continuous, batch 2: RuntimeError: no room" in text
    assert "`ppo` failed" in text
    assert "out of memory" in text


@pytest.mark.parametrize(("low", "answer"), [(0.85, "The intervals overlap."), (0.95, "The intervals do not overlap.")])
def test_two_runs_are_alike_where_their_intervals_overlap(low: float, answer: str) -> None:
    rows = [
        {"device": "cuda", "normalised": {"mean": 0.88, "low": 0.8, "high": 0.9}, "train_seconds": 1.0},
        {"device": "cpu", "normalised": {"mean": 0.97, "low": low, "high": 1.0}, "train_seconds": 2.0},
    ]
    assert answer in markdown({"machine": ABOUT, "command": "", "train": rows})


def test_seeds_at_once_are_compared_with_as_many_in_turn() -> None:
    row = {"seeds": 32, "timesteps": 1000, "together_seconds": 8.0, "alone_seconds": 4.0}
    row |= {"together_return": 0.25, "alone_return": 0.25}
    text = markdown({"machine": ABOUT, "command": "", "seeds": [row]})
    assert "| 32 | 8.0 | 4.0 | 16.0 | 0.250, 0.250 |" in text


@pytest.mark.parametrize("part", ["limits", "ppo", "profile"])
def test_a_part_can_be_measured_without_a_gpu(part: str) -> None:
    rows = list(measure(part, SMALL))
    assert not [row["error"] for row in rows if "error" in row]
    for row in rows:
        rates = [row[name] for name in ("bytes_per_second", "tokens_per_second", "share") if name in row]
        assert rates
        assert min(rates) > 0
    assert markdown({"machine": ABOUT, "command": "", part: rows})


def test_decoding_can_be_measured_without_a_gpu() -> None:
    rows = list(itertools.islice(measure("decode", SMALL), 2))  # continuous batching is slow to start on a CPU
    assert [row["path"] for row in rows] == ["collect", "generate"]
    assert all(row["tokens_per_second"] > 0 for row in rows), rows


def test_a_part_that_fails_or_has_no_time_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(part: str, setting: Setting, out: Path, seconds: float) -> str:
        rows = [{"bytes_per_second": 1e12, "flops_per_second": 1e12}] if part == "limits" else []
        (out / f"{part}.json").write_text(json.dumps(rows))
        return "it broke" if part == "decode" else ""

    monkeypatch.setattr(gpu, "run_apart", fake)
    monkeypatch.setitem(LIMITS, "ppo", 1)  # less than a part is begun with
    results = run_parts(["decode", "ppo", "limits"], SMALL, tmp_path, budget=100)
    assert results["errors"] == {"decode": "it broke", "ppo": "no time was left of 100 s"}
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    assert "moves 1.00 TB/s" in (tmp_path / "gpu.md").read_text()


def _is_running(pid: str) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_takes_too_long_ends_with_all_that_it_has_started() -> None:
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {inner!r}])"
    failure = gpu.run_within([sys.executable, "-I", "-S", "-c", outer], 3)
    first, pid = failure.splitlines()
    assert first == "took more than 3 s"
    deadline = time.monotonic() + 20  # a signal takes its time on a busy machine; the process sleeps for 60 s
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)
    assert gpu.run_within([sys.executable, "-c", "raise SystemExit('no card')"], 10) == "no card\n"
    assert not gpu.run_within([sys.executable, "-c", "print('fine')"], 10)


class Here:
    """A process whose command has run in this one."""

    returncode = 0
    stdout = ""
    stderr = ""

    def __init__(self, command: list[str], **_: object) -> None:
        run_command_here(command[2], *command[3:])

    def communicate(self) -> tuple[str, str]:
        return "", ""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "seeds"])
def test_a_part_that_trains_can_be_measured_without_a_gpu(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_RUNS", str(tmp_path))
    monkeypatch.setattr(gpu_train, "subprocess", SimpleNamespace(run=Here, Popen=Here, PIPE=None, STDOUT=None))
    (row,) = measure(part, SMALL)
    assert "error" not in row
    assert row["timesteps"] >= 256
    assert markdown({"machine": ABOUT, "command": "", part: [row]})


@pytest.mark.slow
def test_the_command_runs_a_part_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--device", "cpu", "--parts", "limits", "--out", str(tmp_path)])
    gpu.main()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["errors"] == {}
    assert results["limits"] == json.loads((tmp_path / "limits.json").read_text())
    assert not [row for row in results["limits"] if "error" in row]
