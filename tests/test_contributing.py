"""CONTRIBUTING tells all that `make test` demands of a new task and a new agent: a copy of the checkout follows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builders.pages import add_agent_rows, generate_pages

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```\w+\n# ([\w/]+\.\w+)\n(.*?)```", re.S)
# What runs over all tasks or all agents, or compares a list of them; the rest of the suite does not know the new ones.
DEMANDING = "brief or vpg or ids_are_those or agents_listed or has_a_page or page_of_tasks or every_family or module"
FILES = (
    "test_readme",
    "agents/runs/test_config",
    "tasks/test_suite",
    "tasks/test_tasks",
    "builders/test_cards",
    "test_project",
)


def copied(to: Path) -> Path:
    """The files of the checkout as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


def follow(page: str, checkout: Path) -> set[str]:
    """Writes the files that a page shows; gives their names."""
    written = set()
    for name, text in BLOCK.findall(page):
        (checkout / name).write_text(text, encoding="utf-8")
        written.add(name)
    return written


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a checkout")
def test_who_follows_contributing_passes_the_tests(tmp_path: Path) -> None:
    checkout = copied(tmp_path / "checkout")
    written = follow((checkout / "CONTRIBUTING.md").read_text(encoding="utf-8"), checkout)
    assert {
        "lmgym/tasks/brief.py",
        "agents/algorithms/vpg.py",
        "conf/agent/vpg.yaml",
    } <= written
    assert "agents/vpg.md" in generate_pages(checkout)
    agents = (checkout / "docs" / "agents" / "README.md").read_text(encoding="utf-8")
    assert "| [`vpg`](vpg.md) | Policy gradient with a learned baseline" in add_agent_rows(agents, checkout)

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=checkout, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout

    run("builders.cards")
    tests = [f"tests/{name}.py" for name in FILES]
    out = run("pytest", "-v", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", DEMANDING, *tests)
    for new in ("[brief] PASSED", "[vpg] PASSED", "test_the_page_of_tasks_is_the_one_the_task_files_make PASSED"):
        assert new in out
