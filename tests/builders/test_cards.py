"""The page of tasks that the task files make."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from conftest import local_tasks

from builders import cards
from lmgym.tasks.stored import ARTEFACTS

ROOT = Path(__file__).parents[2]
WRITTEN = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
FAMILIES = dict.fromkeys(name.partition("-")[0] for name in local_tasks())
page = functools.cache(cards.page)
sections = functools.cache(cards.sections)


def test_the_page_says_of_the_shipped_tasks_what_their_files_say() -> None:
    """The site makes the page anew, so that a task is on it before anybody has written the file."""
    written = {part.partition("\n")[0] for part in WRITTEN.split("\n## ")[1:]}
    assert {file.parent.name for file in Path(ARTEFACTS).glob("*/optima.json")} <= written
    shown = "\n".join([page().split("\n## ")[0], *(text for name, text in sections().items() if name in written)])
    assert shown == WRITTEN, "run `python -m builders.cards`"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_has_a_section_and_a_row(family: str) -> None:
    assert page().count(f"\n## {family}\n") == 1
    assert f"| `{family}" in sections()[family]
