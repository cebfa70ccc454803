"""A task, a reward and an algorithm are a file each (and a yaml): the suites, the tables and the site find all three.

A copy of the checkout follows CONTRIBUTING; nothing else in it is touched.
"""

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
REWARD = "lmgym/rewards/my_rewards.py"  # a reward may be anywhere; here it is made one of the library
# The suites that find each, by what a test's id has in brackets.
SUITES = {
    "brief": ["tasks/test_suite", "tasks/test_tasks", "rewards/test_contract", "builders/test_cards"],
    "lmgym.rewards.my_rewards:variety": ["rewards/test_contract"],
    "vpg": ["agents/test_agents", "agents/test_round_trip", "agents/test_seeds", "agents/test_finite"],
}
# Tests of a list that the new ones are on, or of all files.
LISTS = "ids_are_those or agents_listed or has_a_page or page_says_of or every_family or module or no_file or circle"
OTHERS = ["test_readme", "test_project", "test_structure", "agents/runs/test_config"]


def copy_checkout(to: Path) -> Path:
    """The files of the checkout as they are now, with the bytecode that Python and pytest have of them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)  # as old as it is, or its bytecode would not be its
    for room in {Path(name).parent / "__pycache__" for name in names if name.endswith(".py")}:
        for file in (ROOT / room).glob("*.pyc"):
            (to / room).mkdir(exist_ok=True)
            shutil.copy2(file, to / room)
    return to


def add_files(page: str, checkout: Path) -> set[str]:
    """Adds the files that a page shows; none of them replaces one. Gives their names."""
    added = set()
    for name, text in BLOCK.findall(page):
        path = REWARD if name == "my_rewards.py" else name
        assert not (checkout / path).exists(), path
        (checkout / path).write_text(text, encoding="utf-8")
        added.add(path)
    return added


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a checkout")
def test_what_is_added_is_found(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    added = add_files((checkout / "CONTRIBUTING.md").read_text(encoding="utf-8"), checkout)
    assert added == {
        "lmgym/tasks/brief.py",
        REWARD,
        "agents/algorithms/vpg.py",
        "conf/agent/vpg.yaml",
    }

    pages = generate_pages(checkout)
    assert "::: agents.algorithms.vpg" in pages["agents/vpg.md"]
    assert "::: lmgym.rewards.my_rewards" in pages["api/lmgym.rewards.md"]
    assert "::: lmgym.tasks.brief" in pages["api/lmgym.tasks.md"]
    agents = (checkout / "docs" / "agents" / "README.md").read_text(encoding="utf-8")
    assert "| [`vpg`](vpg.md) | Policy gradient with a learned baseline" in add_agent_rows(agents, checkout)

    files = [f"tests/{name}.py" for name in sorted({*OTHERS, *(name for suite in SUITES.values() for name in suite)})]
    command = ["pytest", "-v", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", f"brief or variety or vpg or {LISTS}"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *files], cwd=checkout, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for new, suites in SUITES.items():
        for suite in suites:
            case = rf"tests/{suite}.py::\w+\[[^\]]*{re.escape(new)}[^\]]*\] PASSED"
            assert re.search(case, done.stdout), (new, suite)
