"""The source files of the checkout, and what they import."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("lmgym", "agents", "builders")
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")  # the fields of a node that hold statements


def files_of(*rooms: str) -> list[Path]:
    """Every Python file of some top-level directories."""
    return [file for room in rooms for file in sorted((ROOT / room).rglob("*.py"))]


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name to file of everything in the packages."""
    files = files_of(*PACKAGES)
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(source: str, module: str, is_package: bool = False, *, for_types: bool = True) -> Iterator[str]:
    """Every module of ours that the source imports, at any depth, functions included.

    Args:
        source: the code.
        module: its dotted name.
        is_package: whether it is the `__init__` of a package.
        for_types: whether to include what is imported in a `TYPE_CHECKING` block.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in statements(ast.parse(source), for_types):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            inner = [f"{origin}.{alias.name}" for alias in node.names]
            found = [name if name in modules() else origin for name in inner]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in PACKAGES)


def statements(node: ast.AST, for_types: bool = True) -> Iterator[ast.AST]:
    """The statements in a node, at any depth, without the `TYPE_CHECKING` blocks unless `for_types`.

    No expression holds one, and there are ten times as many expressions.
    """
    for inner in (inner for field in _BLOCKS for inner in getattr(node, field, [])):
        if not for_types and isinstance(inner, ast.If) and ast.unparse(inner.test).endswith("TYPE_CHECKING"):
            continue
        yield inner
        yield from statements(inner, for_types)
