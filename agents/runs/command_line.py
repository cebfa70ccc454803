"""The command line around Hydra: what every command does, from its arguments to the line that it ends with."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agents.runs.arguments import check_choices, check_forms, options_first
from agents.runs.config import CONF, short_errors
from agents.runs.signals import Stoppable
from agents.runs.surroundings import prepare_process
from agents.runs.sweeps import output_directory, show_multirun
from lmgym.errors import LmGymError
from lmgym.output import ending_with_its_reader

RUN_DIRECTORIES = ("run", "resume")  # keys whose values are paths and nothing else
_LISTS = ("policies",)  # keys that take several values: a,b is [a,b], but with -m
_NEW_DIRECTORIES = ("hydra.run.dir", "hydra.sweep.dir")


def run_command(
    main: Callable[[], Any],
    path_key: str | None = None,
    groups: Sequence[str] = (),
    configs: Path = CONF,
    help_page: Callable[[], str] | None = None,
    *,
    shared: bool = False,
) -> None:
    """Calls a Hydra main with the arguments of this process; ends in a line where they cannot be.

    Args:
        main: decorated by Hydra, with `ending_in_a_line` around what it does.
        path_key: the key whose value is a run directory, if there is one.
        groups: keys whose values are names; a bare word that is one of them is answered with its key.
        configs: the directory of its configs. help_page: what --help prints; None is Hydra's own.
        shared: as for `prepare_process`.
    """
    with ending_with_its_reader():
        if help_page is not None and {"--help", "-h"} & set(sys.argv[1:]):
            print(help_page())
        else:
            prepare_process(shared=shared)
            _run(main, path_key, groups, configs)


def _run(main: Callable[[], Any], path_key: str | None, groups: Sequence[str], configs: Path) -> None:
    with short_errors():
        check_forms(sys.argv[1:], path_key, groups)
        check_choices(sys.argv[1:], configs)
        sys.argv[1:] = prepared(options_first(sys.argv[1:]))
        try:
            main()
        finally:
            show_multirun()


@contextlib.contextmanager
def ending_in_a_line(directory: str | os.PathLike[str] | None = None, *, shared: bool = False) -> Iterator[None]:
    """What a Hydra main does goes in here: Ctrl-C, SIGTERM and what cannot be end it in a line, or without a word.

    Of a multirun what cannot be ends that run alone.

    Args:
        directory: of the run, which a multirun names beside the error; None is where Hydra puts it.
        shared: as for `prepare_process`.
    """
    prepare_process(shared=shared)  # of a process of its own, which a launcher may have made
    try:
        with Stoppable():
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except LmGymError as error:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            name = Path(output_directory(HydraConfig.get()) if directory is None else directory).name
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            raise
        sys.exit(str(error))


def prepared(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a path may stand as it is, a whole number as 2e4, and several policies as a,b.

    A path is quoted for Hydra, whose grammar reads "=" and "," in it.
    """
    multirun = bool({"-m", "--multirun"} & set(arguments))
    listed = arguments if multirun else [_with_list(argument) for argument in arguments]
    return [_with_quoted_path(_with_whole_numbers(argument), multirun) for argument in listed]


def _with_list(argument: str) -> str:
    """`policies=[a,b]` of `policies=a,b`, which Hydra would take for two runs."""
    key, _, values = argument.partition("=")
    is_bare = key in _LISTS and "," in values and values[0] not in "[\"'" and not os.path.exists(values)
    return f"{key}=[{values}]" if is_bare else argument


def _with_whole_numbers(argument: str) -> str:
    """`total_timesteps=20000` of `total_timesteps=2e4`, which YAML reads as a float."""
    key, equals, values = argument.partition("=")
    return key + equals + ",".join(map(_whole_number, values.split(",")))


def _whole_number(text: str) -> str:
    if not re.fullmatch(r"[+-]?\d{1,9}(\.\d{0,9})?[eE]\+?\d{1,2}", text):
        return text
    number = Decimal(text)
    return str(int(number)) if number == number.to_integral_value() else text


def _with_quoted_path(argument: str, multirun: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals or not value:
        return argument
    quoted = f"{key}={hydra_text(value)}"
    if os.path.exists(value):
        special = re.search(r"[^A-Za-z0-9_./:-]", value)
        return quoted if key in RUN_DIRECTORIES or special else argument
    if key in RUN_DIRECTORIES and not multirun:
        return argument if _is_null_or_quoted_path(argument) else quoted
    if key in _NEW_DIRECTORIES and "${" not in value:
        meant = _parsed(argument)
        return argument if meant is not None and not meant.is_sweep_override() else quoted
    return argument


def _is_null_or_quoted_path(argument: str) -> bool:
    """Whether Hydra reads null in an argument, or a path that is there: one that was quoted for Hydra."""
    meant = _parsed(argument)
    if meant is None or meant.is_sweep_override():
        return False
    try:
        value = OmegaConf.create({"value": meant.value()}).value
    except OmegaConfBaseException:
        return False
    return value is None or os.path.exists(str(value))


def _parsed(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_overrides([argument])[0]
    except HydraException:
        return None


def hydra_text(text: str) -> str:
    """A text as the value of an override, from which Hydra and OmegaConf make that same text.

    Hydra reads quotes, and backslashes in front of them; OmegaConf reads `${...}`, and backslashes in front of it.
    """
    literal = re.sub(r"(\\*)\$\{", lambda match: rf"{2 * match[1]}\${{", text)
    return QuotedString(literal, Quote.single).with_quotes()


def shell_command(module: str, *arguments: str) -> str:
    """The command that runs a module with these arguments, to be pasted into a shell."""
    return shlex.join([sys.executable, "-m", module, *arguments])
