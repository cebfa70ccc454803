"""What a run directory may do where it is resumed or graded: it may be read, and none of its code runs.

A config names code by import paths: `agent._target_`, `env.reward`. Those that are typed on a command line are the
user's own. Those that stand in a run directory may be a stranger's, and the directory may hold the file that they name.
They are therefore looked for in installed packages, in `lmgym` and in `agents` alone, never in the working directory.
Anything else has to be named again by the user: `trust=my_rewards`.
"""

from __future__ import annotations

import os
import pkgutil
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lmgym.errors import InvalidArgumentError
from lmgym.files import RunFileError, read_text

_MAX_BYTES = 64 * 2**20  # of a config, long prompts in it included
OWN_PACKAGES = ("lmgym", "agents")  # imported already, wherever they lie


class Named(NamedTuple):
    """Code that a config names: the key that does, the whole import path, and its module and attribute."""

    key: str
    path: str
    module: str
    attribute: str


# -- a config as plain values ----------------------------------------------------------------------------------------

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$")
_TIME = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Plain values: no interpolation, and no alias, for a few lines of those can stand for more than a memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias (*) in line {mark.line + 1}: a config has none")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):  # 1e-3 is a number, as in Hydra, and a text that looks like one is quoted
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIME]
        for first, resolvers in _kind.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def config_text(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, from which `read_config` gives the same ones: `${...}` in a prompt is text."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_config(path: Path) -> dict[str, Any]:
    """The plain values of a config.yaml, in which nothing is resolved.

    Raises:
        RunFileError: naming the file, where it is no YAML or holds no names with values.
    """
    text = read_text(path, _MAX_BYTES)
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RunFileError(f"`{path}` must be a config in YAML, and is not: {error}") from error
    if not isinstance(values, dict):
        raise RunFileError(f"`{path}` must hold names with values, got {type(values).__name__}.")
    return values


# -- the code that it names ------------------------------------------------------------------------------------------


def named_code(values: Mapping[str, Any]) -> list[Named]:
    """The import paths of a config."""
    agent = values.get("agent")
    env = values.get("env")
    found = []
    if isinstance(agent, Mapping) and isinstance(agent.get("_target_"), str):
        module, _, attribute = agent["_target_"].rpartition(".")
        found.append(Named("agent._target_", agent["_target_"], module, attribute))
    for text in _texts(env.get("reward") if isinstance(env, Mapping) else None):
        module, colon, attribute = text.partition(":")
        if colon and not os.path.exists(text):
            found.append(Named("env.reward", text, module, attribute))
    return found


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def trusted_modules(given: Any) -> tuple[str, ...]:
    """Module names from what `trust` was given: null, one name, or a list of them.

    Raises:
        InvalidArgumentError: for anything else.
    """
    names = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise InvalidArgumentError(f"`trust` must be the name of a module, or a list of them, got {given!r}.")
    return tuple(name.partition(":")[0] for name in names)


def needed_trust(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that `trust` has to name before a run with this config can be resumed or graded."""
    outside = [code.module for code in named_code(values) if installed(code.module) is None]
    return tuple(dict.fromkeys(outside))


def trust_argument(modules: Sequence[str]) -> str:
    """What a command to go on says of modules that have to be trusted, quoted for a shell; empty for none."""
    if not modules:
        return ""
    return f" trust={modules[0]}" if len(modules) == 1 else f" 'trust=[{','.join(modules)}]'"


def import_installed(values: Mapping[str, Any], run: Path, trusted: Sequence[str] = ()) -> None:
    """Imports the code that the config of a run directory names, so that a later import finds it loaded.

    Where every module lies is found out before any is executed.

    Args:
        values: the config. run: the directory that it was read from: nothing below it is imported.
        trusted: modules, or packages of them, that the user has named: they are imported as Python does.

    Raises:
        InvalidArgumentError: for code that is neither installed nor trusted, or that cannot be imported.
    """
    found = []
    for code in named_code(values):
        if any(code.module == name or code.module.startswith(f"{name}.") for name in trusted):
            continue
        specs = installed(code.module)
        if specs is None or any(_is_below(folder, run) for spec in specs for folder in _folders(spec)):
            raise InvalidArgumentError(_refusal(code))
        found.append((code, specs))
    for code, specs in found:
        try:
            module = _load(specs)
        except Exception as error:
            raise InvalidArgumentError(f"`{code.key}` {code.path!r} could not be imported: {error}") from error
        if not hasattr(module, code.attribute):
            raise InvalidArgumentError(f"`{code.key}` must name code, and {code.module} has no {code.attribute!r}.")


def _refusal(code: Named) -> str:
    if not all(part.isidentifier() for part in code.module.split(".")):
        return f"`{code.key}` must be an import path, got {code.path!r}."
    folder = _find(code.module.partition(".")[0], sys.path)
    where = "is not installed" if folder is None else f"would come from {next(iter(_folders(folder)), 'elsewhere')}"
    return (
        f"`{code.key}` of a run directory must be code of lmgym, of agents or of an installed package, and "
        f"{code.path!r} {where}. Where you trust that code, say so: trust={code.module}"
    )


def installed(module: str) -> list[ModuleSpec] | None:
    """Where a module of an installed package, of `lmgym` or of `agents` lies, after the packages around it.

    Nothing is executed, where `importlib.util.find_spec` would execute the packages around it.

    Returns:
        None where it is not there, and where another module of that name has been imported from elsewhere.
    """
    first, *rest = module.split(".")
    spec = sys.modules[first].__spec__ if first in OWN_PACKAGES else _find(first, _site_directories())
    if spec is None or not _is_free(spec):
        return None
    specs = [spec]
    for part in rest:
        spec = _find(f"{spec.name}.{part}", spec.submodule_search_locations or ())
        if spec is None or not _is_free(spec):
            return None
        specs.append(spec)
    return specs


def _site_directories() -> list[str]:
    """Where installers put packages; not what .pth files add, which may be the working directory."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    on_path = {os.path.realpath(entry) for entry in sys.path}
    return [folder for folder in dict.fromkeys(folders) if os.path.realpath(folder) in on_path]


def _find(name: str, directories: Sequence[str]) -> ModuleSpec | None:
    """A module in some directories; of a namespace package, its portions there and nowhere else."""
    portions: list[str] = []
    for directory in directories:
        finder: Any = pkgutil.get_importer(directory)
        spec = None if finder is None else finder.find_spec(name)
        if spec is not None and spec.loader is not None:
            return spec
        if spec is not None:
            portions += spec.submodule_search_locations or ()
    if not portions:
        return None
    namespace = ModuleSpec(name, None, is_package=True)
    namespace.submodule_search_locations = portions
    return namespace


def _is_free(spec: ModuleSpec) -> bool:
    """Whether the name is not taken by a module that was imported from elsewhere."""
    loaded = sys.modules.get(spec.name)
    if loaded is None:
        return True
    known = getattr(loaded, "__spec__", None)
    if known is None:
        return False
    if known.origin is None or spec.origin is None:  # a namespace package: its portions are looked through one by one
        return known.origin == spec.origin
    return os.path.realpath(known.origin) == os.path.realpath(spec.origin)


def _folders(spec: ModuleSpec) -> list[str]:
    return [spec.origin] if spec.origin is not None else list(spec.submodule_search_locations or ())


def _is_below(path: str, directory: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def _load(specs: Sequence[ModuleSpec]) -> Any:
    """Executes modules from just these folders, outermost first, and gives the last."""
    for spec in specs:
        if spec.name in sys.modules:
            continue
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            if spec.loader is not None:
                spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        around, _, name = spec.name.rpartition(".")
        if around:
            setattr(sys.modules[around], name, module)
    return sys.modules[specs[-1].name]
