"""The defaults of an agent are written once, in its dataclass: a yaml of an agent gets every field that it leaves out.

So does one of the group `reward`, from the numbers of a reward model's training.

Hydra then shows them all (`--cfg job`), and takes `agent.lr=1e-3` without a "+". Nothing is imported for it, for that
takes seconds: the source of a module that is not loaded yet is parsed.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from agents.runs.sources import Source, base_classes, find_class, resolve, resolve_constant
from lmgym.ranges import Range, field_types

REWARD_CONFIG = "lmgym.reward_models.config.RewardConfig"
_PLAIN_TYPES = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True)
class Default:
    """A field of a config.

    Attributes:
        value: where nobody gives one. type: with its range, as `lmgym.ranges` checks it; `Any` where it is not known.
        comment: after it in the source, or "".
    """

    value: Any
    type: Any = Any
    comment: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """All the values there are, where these are words."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()


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
        elif config_path.startswith("reward/") and isinstance(config, DictConfig):
            values = {name: default.value for name, default in find_fields(REWARD_CONFIG).items()}
            result.config = OmegaConf.merge(values, config)
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
    found = find_class(module, name)
    if found is None:  # of no file: made in this process
        kind = getattr(getattr(sys.modules.get(module), name, None), "Config", None)
        return _of_class(kind) if is_dataclass(kind) else {}
    config = _find_config(*found)
    return {} if config is None else _parsed_fields(*config)


def find_fields(target: str) -> dict[str, Default]:
    """The fields of a dataclass that have a default, read as `find_defaults` reads them.

    Args:
        target: its import path.
    """
    module, _, name = target.rpartition(".")
    found = find_class(module, name)
    return {} if found is None else _parsed_fields(*found)


def find_types(target: str) -> dict[str, Any]:
    """The types of these fields by name."""
    return {name: field.type for name, field in find_fields(target).items()}


def _of_class(kind: Any) -> dict[str, Default]:
    types = field_types(kind)
    found = [field for field in fields(kind) if field.init and _has_default(field)]
    return {field.name: Default(_value(field), types[field.name]) for field in found}


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _value(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


# -- the same, of a source that is not run ---------------------------------------------------------------------------


def _find_config(source: Source, node: ast.ClassDef) -> tuple[Source, ast.ClassDef] | None:
    """The class that an agent calls `Config`, or that the first of its bases does."""
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        else:
            continue
        if name == "Config" and isinstance(statement.value, ast.Name):
            return resolve(source, statement.value.id)
    for base in reversed(list(base_classes(source, node))):
        found = _find_config(*base)
        if found is not None:
            return found
    return None


def _parsed_fields(source: Source, node: ast.ClassDef) -> dict[str, Default]:
    found: dict[str, Default] = {}
    for base in base_classes(source, node):
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
        found[statement.target.id] = Default(value, _read_type(source, statement.annotation), comment)
    return found


def _read_type(source: Source, node: ast.expr) -> Any:
    """The type that an annotation stands for; `Any` for one that `lmgym.ranges` does not check."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return _PLAIN_TYPES.get(node.id) or _read_named_type(source, node.id)
    if isinstance(node, ast.BinOp):
        return Union[_read_type(source, node.left), _read_type(source, node.right)]  # noqa: UP007 - of a name in quotes too
    if not isinstance(node, ast.Subscript):
        return Any
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if ast.unparse(node.value) == "Literal":
        values = tuple(_read_type(source, part) for part in parts)
        return Any if Any in values else Literal[values]
    if ast.unparse(node.value) == "Annotated":
        kind = _read_type(source, parts[0])
        allowed = _read_range(parts[1])
        return kind if allowed is None else Annotated[kind, allowed]
    return Any


def _read_named_type(source: Source, name: str) -> Any:
    try:
        return _read_type(*resolve_constant(source, name))
    except ValueError:
        return Any


def _read_range(node: ast.expr) -> Range | None:
    """The range that `Range(0, 1, open_low=True)` makes; None for anything else."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "Range":
        return None
    try:
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        return Range(*map(ast.literal_eval, node.args), **named)
    except (ValueError, TypeError):
        return None


def _evaluate(source: Source, node: ast.expr) -> Any:
    """A literal, a constant, or what `field(default=...)` or `field(default_factory=dict)` is given.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(node, ast.Name):
        return _evaluate(*resolve_constant(source, node.id))
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
