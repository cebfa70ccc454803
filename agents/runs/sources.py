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
        path = _find_file(module)
        return None if path is None else _parse(str(path), path.stat().st_mtime_ns)
    except (ImportError, ValueError, OSError, SyntaxError):
        return None


def _find_file(module: str) -> Path | None:
    """The file of a module; the packages around it are not run, which `find_spec` would do."""
    package, *names = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if not names:
        return Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *names)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def find_parameters(module: str, name: str) -> list[str] | None:
    """The names that the `__init__` of a class takes after `self`; None where there is no such source."""
    found = find_class(module, name)
    if found is None:
        return None
    for statement in found[1].body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            arguments = statement.args
            return [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]
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
