"""Commands for human feedback: `python -m lmgym.feedback serve to_label.jsonl`, and others."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmgym.errors import InvalidArgumentError, LmGymError, check_choice
from lmgym.feedback import commands
from lmgym.feedback.options import read_options
from lmgym.output import ending_with_its_reader


@dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
        run: takes the files and the options. options: the dataclass of the options. files: what they are called.
        optional: how many of the last of them may be left out. example: of its use. summary: what it does.
    """

    run: Callable[..., None]
    options: type[Any]
    files: tuple[str, ...]
    example: str
    summary: str
    optional: int = 0


COMMANDS = {
    "serve": Command(
        commands.serve,
        commands.ServeOptions,
        ("TO_LABEL",),
        "serve to_label.jsonl",
        "Serves the labelling page for a file of records.",
    ),
    "simulate": Command(
        commands.simulate,
        commands.SimulateOptions,
        ("TO_LABEL", "LABELS"),
        "simulate to_label.jsonl prefs.jsonl annotators=3 temperature=0.5",
        "Has simulated people judge a file of records; LABELS is prefs.jsonl where it is not given.",
        optional=1,
    ),
    "export": Command(
        commands.export,
        commands.ExportOptions,
        ("SOURCE", "TARGET"),
        "export labels.db prefs.jsonl",
        "Writes a file, or the answers of the labelling page, as JSON lines or Parquet, in any layout.",
    ),
    "import": Command(
        commands.export,
        commands.ExportOptions,
        ("SOURCE", "TARGET"),
        "import pairs.parquet prefs.jsonl",
        "Reads any layout and writes records: the same command as export.",
    ),
    "check": Command(
        commands.check,
        commands.CheckOptions,
        ("SOURCE",),
        "check prefs.jsonl",
        "Lists every record of a file that cannot be read, and counts the judgements.",
    ),
}


def main(words: Sequence[str]) -> None:
    """Runs a command."""
    wants_help = not words or bool({"-h", "--help"} & set(words))
    known = [word for word in words if word in COMMANDS]
    if wants_help:
        print(_help_of(known[0]) if known else _help(), end="")
        return
    name, *rest = words
    try:
        check_choice("command", name, COMMANDS)
        command = COMMANDS[name]
        files = [word for word in rest if not _is_option(word)]
        least = len(command.files) - command.optional
        if not least <= len(files) <= len(command.files):
            raise InvalidArgumentError(
                f"`{name}` needs {' '.join(command.files[:least])}, got {files}: "
                f"python -m lmgym.feedback {command.example}"
            )
        command.run(*files, read_options(command.options, [word for word in rest if _is_option(word)]))
    except LmGymError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _is_option(word: str) -> bool:
    """Whether a word is `name=value`; a file of such a name can be given as ./name=value."""
    return re.match(r"[A-Za-z_]+=", word) is not None


def _help() -> str:
    lines = [f"  {name:<10}{command.summary}\n" for name, command in COMMANDS.items()]
    return (
        f"python -m lmgym.feedback COMMAND FILES [NAME=VALUE ...]\n\n{''.join(lines)}\n"
        "python -m lmgym.feedback COMMAND --help lists the names of a command.\n"
    )


def _help_of(name: str) -> str:
    """The files and options of a command, with their defaults."""
    command = COMMANDS[name]
    files = [
        f"[{file}]" if i >= len(command.files) - command.optional else file for i, file in enumerate(command.files)
    ]
    text = f"python -m lmgym.feedback {name} {' '.join(files)} [NAME=VALUE ...]\n\n{command.summary}\n"
    meanings = _meanings(command.options)
    defaults = vars(command.options())
    if defaults:
        text += "The names, with their defaults:\n"
    width = max((len(f"{key}={value}") for key, value in defaults.items()), default=0)
    for key, value in defaults.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        text += f"  {f'{key}={shown}':<{width}}  {meanings.get(key, '')}\n"
    return f"{text}\nExample: python -m lmgym.feedback {command.example}\n"


def _meanings(options: type[Any]) -> dict[str, str]:
    """What the docstrings of a dataclass and its parents say of each field."""
    found: dict[str, str] = {}
    for kind in options.__mro__:
        body = (kind.__doc__ or "").partition("Attributes:")[2]
        for match in re.finditer(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", body, re.MULTILINE):
            found.setdefault(match[1], " ".join(match[2].split()))
    return found


if __name__ == "__main__":
    with ending_with_its_reader():
        main(sys.argv[1:])
