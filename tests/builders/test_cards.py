"""The page of tasks that the task files make."""

from __future__ import annotations

from pathlib import Path

from builders import cards

ROOT = Path(__file__).parents[2]


def test_the_page_of_tasks_is_the_one_the_task_files_make() -> None:
    assert (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8") == cards.page(), "run `python -m builders.cards`"
