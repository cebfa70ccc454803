"""Classes and constants of modules that are not loaded: that would take seconds, and parsing their source does not."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A module as text: its lines, its classes and constants, and where a name that it imports comes from."""

    lines: list[str]
    classes: dict[str, ast.ClassDef]
    constants: dict[str, ast.expr]
    imports: dict[str, tuple[str, str]]


@functools.cache
def _parse(path: str, changed: int) -> Source:
    """Parses a file; `changed` is its time, so that an edited one is parsed again."""
    text = Path(path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    constants: dict[str, ast.expr] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return Source(text.splitlines(), classes, constants, imports)


def _find_source(module: str) -> Source | None:
    """A module as text; None where it has none."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return None
        return _parse(spec.origin, Path(spec.origin).stat().st_mtime_ns)
    except (ImportError, ValueError, OSError, SyntaxError):
        return None


def find_class(module: str, name: str) -> tuple[Source, ast.ClassDef] | None:
    """A class by its module, or by one that imports it by name; None where there is no such source."""
    source = _find_source(module)
    return None if source is None else resolve(source, name)


def resolve(source: Source, name: str) -> tuple[Source, ast.ClassDef] | None:
    """The class that a name stands for in a module, and where that is written."""
    if name in source.classes:
        return source, source.classes[name]
    if name in source.imports:
        return find_class(*source.imports[name])
    return None


def resolve_constant(source: Source, name: str) -> tuple[Source, ast.expr]:
    """What a name stands for, and where that is written; raises ValueError where it is no constant."""
    if name in source.constants:
        return source, source.constants[name]
    origin = None
    if name in source.imports:
        module, imported = source.imports[name]
        origin = _find_source(module)
    if origin is None:
        raise ValueError(name)
    return resolve_constant(origin, imported)


def base_classes(source: Source, node: ast.ClassDef) -> Iterator[tuple[Source, ast.ClassDef]]:
    """The classes that a class extends, the last one first: the order in which dataclasses collect fields."""
    for base in reversed(node.bases):
        named = base.value if isinstance(base, ast.Subscript) else base  # Generic[...] of a class
        found = resolve(source, named.id) if isinstance(named, ast.Name) else None
        if found is not None:
            yield found
