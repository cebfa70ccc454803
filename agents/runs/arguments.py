"""The arguments of a command before Hydra reads them: put in its order, and other forms answered with what to type."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException

from agents.runs.config import CONF
from agents.runs.tasks import USUAL_SETTINGS
from lmgym.errors import InvalidArgumentError, unknown_name
from lmgym.tasks import registered_tasks


def options_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments with overrides after all options: Hydra takes no second group of them, as in `a=1 -m b=2`."""
    options = []
    overrides = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or _takes_a_value(before) or "=" not in argument:
            options.append(argument)
        else:
            overrides.append(argument)
    return options + overrides


def check_forms(arguments: Sequence[str], path_key: str | None, groups: Sequence[str]) -> None:
    """Answers a bare word, a bare path and `--key` with what to type.

    Args:
        arguments: of the command.
        path_key: the key whose value is a run directory; None where there is none.
        groups: keys whose values are names; such a name alone tells its key.

    Raises:
        InvalidArgumentError: naming every such argument.
    """
    known = {name: group for group in groups for name in find_names(group, arguments)}
    wrong = []
    is_value = False  # of the option before it
    for argument, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if is_value:
            is_value = False
        elif _is_unknown_option(argument):
            name, equals, value = argument.partition("=")
            is_value = not equals and _is_bare(after)
            if not equals:
                value = after if is_value else "..."
            override = f"{name.lstrip('-').replace('-', '_')}={value}"
            wrong.append(f"`{argument}` must be KEY=VALUE without dashes: {shlex.quote(override)}")
        elif argument.startswith("-"):
            is_value = _takes_a_value(argument)
        elif _is_bare(argument):
            wrong.append(f"`{argument}` must be KEY=VALUE{_what_is_meant(argument, path_key, known)}")
    if wrong:
        raise InvalidArgumentError("\n".join(wrong))


@functools.cache
def _options() -> dict[str, bool]:
    """Hydra's options, and whether each takes a value."""
    return {name: action.nargs != 0 for name, action in get_args_parser()._option_string_actions.items()}


def _takes_a_value(argument: str) -> bool:
    return _options().get(argument, False)


def _is_unknown_option(argument: str) -> bool:
    name = argument.partition("=")[0]
    return len(name) > 2 and name.startswith("--") and not any(option.startswith(name) for option in _options())


def _is_bare(argument: str) -> bool:
    """Whether an argument is a value without a key. Hydra reads `~key` too."""
    is_path = argument.startswith(("/", "./", "../", "~/"))
    return is_path or ("=" not in argument and not argument.startswith(("~", "-")) and argument != "")


def _what_is_meant(word: str, path_key: str | None, known: Mapping[str, str]) -> str:
    if path_key is not None and (not known or os.path.isdir(word)):
        return f": {shlex.quote(f'{path_key}={word}')}"
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    if close:
        return f": {known[close[0]]}={close[0]}"
    return ", such as task=keyword-8 or seed=1." if known else "."


def check_choices(arguments: Sequence[str], configs: Path) -> None:
    """Answers a group of configs to which anything but a name is given, such as `agent=null`.

    Args:
        arguments: of the command. configs: the directory with a folder for each group.

    Raises:
        UnknownNameError: naming the first one.
    """
    for argument in arguments:
        group, equals, _ = argument.partition("=")
        if not equals or not re.fullmatch(r"\w+", group) or not (configs / group).is_dir():
            continue
        try:
            override = OverridesParser.create().parse_overrides([argument])[0]
        except HydraException:
            continue  # Hydra says what is wrong with it
        value = override.value()
        for name in value.list if isinstance(value, ChoiceSweep) else [value]:
            if not isinstance(name, str | QuotedString | list):
                raise unknown_name(group, name, find_configs(group, arguments, configs))


def find_names(group: str, arguments: Sequence[str]) -> list[str]:
    """The values that a key may have: tasks, families of tasks among them, or files of configs.

    Args:
        group: "task", or a group of configs such as "agent". arguments: as for `find_configs`.
    """
    return [*USUAL_SETTINGS, *registered_tasks()] if group == "task" else list(find_configs(group, arguments))


def find_configs(group: str, arguments: Sequence[str], configs: Path = CONF) -> dict[str, Path]:
    """The files of a group of configs by their names, in a directory and in the one that `--config-dir` adds.

    Args:
        group: such as "agent". arguments: of the command. configs: the directory.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    added = parser.parse_known_args(list(arguments))[0].config_dir
    paths = [path for folder in (configs, added) if folder is not None for path in (folder / group).glob("*.yaml")]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}
