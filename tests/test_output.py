"""`lmgym.output`: a command whose output nobody reads any more ends without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmgym.output import READER_GONE

ROOT = Path(__file__).parents[1]
LONG = "print('x' * 1_000_000)"  # more than any pipe holds


def run_without_reader(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with an output whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)


def arguments_of(block: str) -> list[str]:
    return ["-c", f"import sys\nfrom lmgym.output import ending_with_its_reader as ends\nwith ends():\n    {block}"]


@pytest.mark.parametrize("block", [LONG, "print('short')", "print('short'); sys.exit('why')"])
def test_a_program_ends_with_its_reader(block: str) -> None:
    done = run_without_reader(*arguments_of(block))
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_another_pipe_that_breaks_is_still_an_error() -> None:
    command = [sys.executable, *arguments_of("raise BrokenPipeError('of a worker')")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "of a worker" in done.stderr


@pytest.mark.parametrize(
    "module", [*(f"agents.{name}" for name in ("train", "evaluate", "sample", "reward", "worth")), "lmgym.feedback"]
)
def test_a_help_page_may_be_cut(module: str) -> None:
    done = run_without_reader("-m", module, "--help")
    assert (done.returncode, done.stderr) == (READER_GONE, "")
