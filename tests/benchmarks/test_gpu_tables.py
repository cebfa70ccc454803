"""What the measurements on a GPU print, and that each of them runs without one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
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


@pytest.mark.parametrize("part", ["limits", "ppo"])
def test_a_part_can_be_measured_without_a_gpu(part: str) -> None:
    rows = list(measure(part, SMALL))
    assert not [row["error"] for row in rows if "error" in row]
    for row in rows:
        rates = [row[name] for name in ("bytes_per_second", "tokens_per_second") if name in row]
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
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    failure = gpu.run_within([sys.executable, "-c", outer], 5)
    first, pid = failure.splitlines()
    assert first == "took more than 5 s"
    deadline = time.monotonic() + 20  # a signal takes its time on a busy machine; the process sleeps for 60 s
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)
    assert gpu.run_within([sys.executable, "-c", "raise SystemExit('no card')"], 10) == "no card\n"
    assert not gpu.run_within([sys.executable, "-c", "print('fine')"], 10)


@pytest.mark.slow
def test_everything_runs_at_tiny_shapes_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["errors"] == {}
    assert not [row for part in LIMITS for row in results[part] if "error" in row]
