"""Markdown pages as the tests read them: fenced blocks, tables, prose.

A Python block runs in a namespace of its own; one below the line `<!-- continues -->` goes on in that of the last one.
A block whose first line is a comment with a path (`# agents/vpg.py`) is that file.
"""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTINUES = "<!-- continues -->"


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line its code begins on, whether it continues the one before, and its code."""

    document: Path
    language: str
    line: int
    continues: bool
    code: str

    @property
    def path(self) -> str | None:
        """The file that the block says it is."""
        found = re.match(r"# ([\w/]+\.(?:py|yaml))\n", self.code)
        return found[1] if found else None


def blocks(document: Path) -> list[Block]:
    found = []
    lines = document.read_text(encoding="utf-8").splitlines()
    start = None
    for at, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = at
            continue
        code = "\n".join(lines[start + 1 : at]) + "\n"
        continues = start > 0 and lines[start - 1] == CONTINUES
        found.append(Block(document, lines[start][3:].strip(), start + 2, continues, code))
        start = None
    assert start is None, f"{document.name}: the block on line {start} has no end"
    return found


def chains(document: Path) -> list[list[Block]]:
    """Python blocks, those that continue one another together."""
    grouped: list[list[Block]] = []
    for block in blocks(document):
        if block.language == "python":
            if block.continues:
                grouped[-1].append(block)
            else:
                grouped.append([block])
    return grouped


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def table(document: Path, first: str) -> dict[str, list[str]]:
    """The rows below the header whose first cell is `first`: name without backticks to the cells after it."""
    lines = iter(document.read_text(encoding="utf-8").splitlines())
    header = next((line for line in lines if line.startswith(f"| {first} |")), None)
    assert header is not None, f"{document.name} has no table of {first!r}"
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = [cell.strip("`") for cell in cells]
    return rows


def execute(block: Block, module: types.ModuleType) -> None:
    """Runs a block, with the line numbers of its document in a traceback."""
    exec(compile("\n" * (block.line - 1) + block.code, str(block.document), "exec"), module.__dict__)
