"""Where the numbers of a run come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from agents.comparison.table import read_runs
from agents.runs.origin import find_command, find_commit, find_machine, find_origin


def test_the_command_of_a_process_is_noted_and_that_of_a_worker_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "agents.train", "task=rare-2", "env.prompts=a b"])
    assert find_command() == "python -m agents.train task=rare-2 'env.prompts=a b'"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "from multiprocessing.spawn import spawn_main; ..."])
    assert find_command() is None


def test_the_machine_and_the_commit() -> None:
    machine = find_machine()
    assert machine["cores"] >= 1
    assert machine["system"]
    commit = find_commit()
    assert commit is None or len(commit.rstrip("+")) == 40


def test_the_table_of_runs_has_the_origin(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    from finished_runs import write_run

    (write_run(tmp_path / "a") / "origin.json").write_text(json.dumps(find_origin()), encoding="utf-8")
    row = read_runs([tmp_path]).runs_to_arrow().to_pylist()[0]
    assert json.loads(row["machine"]) == find_machine()
    assert row["commit"] == find_commit()
