"""The defaults of an agent are written once, in its dataclass: a yaml of an agent gets every field that it leaves out.

Hydra then shows them all (`--cfg job`), and takes `agent.lr=1e-3` without a "+". Nothing is imported for it, for that
takes seconds: the source of a module that is not loaded yet is parsed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True)
class Default:
    """A field of a config.

    Attributes:
        value: where nobody gives one. choices: all the values there are, where these are words.
        comment: after it in the source, or "".
    """

    value: Any
    choices: tuple[str, ...] = ()
    comment: str = ""


# -- what Hydra reads ------------------------------------------------------------------------------------------------


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of config files; what it reads for the group `agent` has every field of the agent's config.

    It has the name of the one that it replaces: by that Hydra knows, in each process of a multirun, that a reader of
    files is registered already.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Reads a file of configs; one that names an agent gets the fields that it leaves out."""
        result = super().load_config(config_path)
        config = result.config
        if config_path.startswith("agent/") and isinstance(config, DictConfig):
            target = config.get("_target_")
            if isinstance(target, str):
                values = {name: default.value for name, default in find_defaults(target).items()}
                result.config = OmegaConf.merge({"_target_": target}, values, config)
        return result


def complete_agents() -> None:
    """Has Hydra read the files of every search path, `--config-dir` included, by the reader above."""
    Plugins.instance()  # makes the readers that come with Hydra known, and asks for no second one of a scheme
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


# -- the fields of a config ------------------------------------------------------------------------------------------


def find_defaults(target: str) -> dict[str, Default]:
    """The fields of an agent's config that have a default, those of its base classes first.

    Args:
        target: import path of the agent's class, such as "agents.algorithms.ppo.PPO".

    Returns:
        Defaults by name: those that can be read without running the module, which are literals, constants and empty
        containers. Nothing for what is no agent or cannot be found; a plan says so.
    """
    module, _, name = target.rpartition(".")
    found = _find_class(module, name)
    if found is None:  # of no file: made in this process
        kind = getattr(getattr(sys.modules.get(module), name, None), "Config", None)
        return _of_class(kind) if is_dataclass(kind) else {}
    config = _find_config(*found)
    return {} if config is None else _parsed_fields(*config)


def _of_class(kind: Any) -> dict[str, Default]:
    return {field.name: Default(_value(field)) for field in fields(kind) if field.init and _has_default(field)}


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _value(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


# -- the same, of a source that is not run ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A module as text: its lines, its classes and constants, and where a name that it imports comes from."""

    lines: list[str]
    classes: dict[str, ast.ClassDef]
    constants: dict[str, ast.expr]
    imports: dict[str, tuple[str, str]]


@functools.cache
def _parse(path: str, changed: int) -> _Source:
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
    return _Source(text.splitlines(), classes, constants, imports)


def _find_source(module: str) -> _Source | None:
    """A module as text; None where it has none."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return None
        return _parse(spec.origin, Path(spec.origin).stat().st_mtime_ns)
    except (ImportError, ValueError, OSError, SyntaxError):
        return None


def _find_class(module: str, name: str) -> tuple[_Source, ast.ClassDef] | None:
    """A class by its module, or by one that imports it by name; None where there is no such source."""
    source = _find_source(module)
    return None if source is None else _resolve(source, name)


def _resolve(source: _Source, name: str) -> tuple[_Source, ast.ClassDef] | None:
    if name in source.classes:
        return source, source.classes[name]
    if name in source.imports:
        return _find_class(*source.imports[name])
    return None


def _resolve_constant(source: _Source, name: str) -> tuple[_Source, ast.expr]:
    """What a name stands for, and where that is written; raises ValueError where it is no constant."""
    if name in source.constants:
        return source, source.constants[name]
    origin = None
    if name in source.imports:
        module, imported = source.imports[name]
        origin = _find_source(module)
    if origin is None:
        raise ValueError(name)
    return _resolve_constant(origin, imported)


def _bases(source: _Source, node: ast.ClassDef) -> Iterator[tuple[_Source, ast.ClassDef]]:
    """The classes that a class extends, the last one first: the order in which dataclasses collect fields."""
    for base in reversed(node.bases):
        named = base.value if isinstance(base, ast.Subscript) else base  # Generic[...] of a class
        found = _resolve(source, named.id) if isinstance(named, ast.Name) else None
        if found is not None:
            yield found


def _find_config(source: _Source, node: ast.ClassDef) -> tuple[_Source, ast.ClassDef] | None:
    """The class that an agent calls `Config`, or that the first of its bases does."""
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        else:
            continue
        if name == "Config" and isinstance(statement.value, ast.Name):
            return _resolve(source, statement.value.id)
    for base in reversed(list(_bases(source, node))):
        found = _find_config(*base)
        if found is not None:
            return found
    return None


def _parsed_fields(source: _Source, node: ast.ClassDef) -> dict[str, Default]:
    found: dict[str, Default] = {}
    for base in _bases(source, node):
        found |= _parsed_fields(*base)
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if statement.value is None or "ClassVar" in ast.unparse(statement.annotation):
            continue
        try:
            value = _evaluate(source, statement.value)
        except ValueError:
            continue
        comment = source.lines[(statement.end_lineno or 1) - 1][statement.end_col_offset or 0 :].lstrip(" #")
        found[statement.target.id] = Default(value, _find_choices(source, statement.annotation), comment)
    return found


def _find_choices(source: _Source, node: ast.expr) -> tuple[str, ...]:
    """The words of a `Literal`, those of a `Literal` inside it too, or of a name that stands for one; or ()."""
    if isinstance(node, ast.Constant):
        return (node.value,) if isinstance(node.value, str) else ()
    if isinstance(node, ast.Name):
        try:
            return _find_choices(*_resolve_constant(source, node.id))
        except ValueError:
            return ()
    if not isinstance(node, ast.Subscript) or ast.unparse(node.value) != "Literal":
        return ()
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return tuple(word for part in parts for word in _find_choices(source, part))


def _evaluate(source: _Source, node: ast.expr) -> Any:
    """A literal, a constant, or what `field(default=...)` or `field(default_factory=dict)` is given.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(node, ast.Name):
        return _evaluate(*_resolve_constant(source, node.id))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field":
        for keyword in node.keywords:
            if keyword.arg == "default":
                return _evaluate(source, keyword.value)
            if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Name):
                name = keyword.value.id
                if name in ("dict", "list"):
                    return {} if name == "dict" else []
        raise ValueError(ast.unparse(node))
    return ast.literal_eval(node)
