"""Commands on other people's machines: plain terminals, notebooks, and programs that start a command several times."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agents.runs.surroundings import prepare_process, refuse_ranks

ROOT = Path(__file__).parents[3]
RANKS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of the test's own."""
    for name in (*RANKS, *RANKS.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "return 0.5 +- 0.1 >= \\xfc \\u6f22 \\U0001f600 \\udc80"),
        ("latin-1", "return 0.5 ± 0.1 >= ü \\u6f22 \\U0001f600 \\udc80"),
        ("utf-8", "return 0.5 ± 0.1 ≥ ü 漢 😀 \\udc80"),
    ],
)
def test_a_terminal_shows_what_it_can(encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding=encoding))
    prepare_process()
    print("return 0.5 ± 0.1 ≥ ü 漢 😀 \udc80", end="", flush=True)
    assert terminal.getvalue().decode(encoding) == expected


def test_pictures_need_no_backend_of_a_notebook() -> None:
    prepare_process()
    assert os.environ["MPLBACKEND"] == "agg"
    assert os.environ["OMP_WAIT_POLICY"] == "active"  # the user's own


@pytest.mark.parametrize(("size", "rank"), RANKS.items())
def test_one_of_several_processes_is_refused(size: str, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(size, "2")
    with pytest.raises(SystemExit, match=rf"one of several \({size}=2\): start it with python instead"):
        refuse_ranks()
    monkeypatch.setenv(rank, "1")
    with pytest.raises(SystemExit, match=r"^1$"):  # the first has said it
        refuse_ranks()
    monkeypatch.setenv(size, "1")
    refuse_ranks()


def test_a_batch_script_of_slurm_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")  # what the job may start
    monkeypatch.setenv("SLURM_PROCID", "0")
    refuse_ranks()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # what srun has started
    with pytest.raises(SystemExit, match="one of several"):
        refuse_ranks()


@pytest.mark.parametrize("module", ["agents.sample", "agents.evaluate", "builders.build"])
def test_every_command_refuses_in_a_line_and_leaves_nothing(module: str, tmp_path: Path) -> None:
    env = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", module, f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "one of several (WORLD_SIZE=2)" in done.stderr
    assert not (tmp_path / "run").exists()
