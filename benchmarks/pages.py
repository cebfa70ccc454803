"""Puts the tables that the benchmarks make into the pages of the docs, between markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    """What stands before and after the table of that name in a page: comments that no reader sees."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def has_markers(path: Path, name: str) -> bool:
    """Whether a page has lines for the table of that name."""
    page = path.read_text(encoding="utf-8")
    return all(marker in page for marker in markers(name))


def table(path: Path, name: str) -> list[str]:
    """The lines of the table of that name in a page."""
    start, end = markers(name)
    part = path.read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    return part.strip().splitlines()


def fill(path: Path, name: str, lines: Sequence[str]) -> None:
    """Puts a table into a page, instead of the one that is there.

    Raises:
        ValueError: if the page has no markers of that name.
    """
    start, end = markers(name)
    if not has_markers(path, name):
        raise ValueError(f"`{path}` must have the lines {start} and {end}, which the table goes between.")
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    path.write_text("\n".join([before + start, "", *lines, "", end]) + after, encoding="utf-8")
