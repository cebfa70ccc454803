"""What the measurements on a GPU print, and that each of them runs without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import PARTS, markdown


def test_the_tables_of_what_was_measured() -> None:
    decode = {"model": "m", "batch": 2, "horizon": 8, "bytes_a_step": 100.0, "flops_a_step": 10.0, "collect": 5.0}
    limits = [{"bytes_per_second": 1000.0, "flops_per_second": 1000.0}]
    about = {"device": "a card", "torch": "2", "transformers": "5", "date": "2026-01-01"}
    results: dict[str, Any] = {
        "machine": about,
        "limits": limits,
        "decode": [decode],
        "errors": {"ppo": "out of memory"},
    }
    text = markdown(results)
    # The floor of a step is 100 bytes at 1,000 bytes/s: 2 tokens in 0.1 s.
    assert "| m | 2 | 20 | 5 | 0.25 |" in text
    assert "`ppo` failed" in text
    assert "out of memory" in text


@pytest.mark.parametrize("part", ["limits", "decode", "ppo"])
def test_a_part_can_be_measured_without_a_gpu(part: str) -> None:
    for row in PARTS[part](True):
        rates = [row[name] for name in ("bytes_per_second", "collect", "tokens_per_second") if name in row]
        assert rates
        assert min(rates) > 0


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(tmp_path), "--parts", "limits"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["errors"] == {}
    assert results["limits"][0]["bytes_per_second"] > 0
