"""What the commands of `python -m lmgym.feedback` do, and their options."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, fields

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.files import read_records, write_records
from lmgym.feedback.serving import ServeOptions, serve
from lmgym.feedback.simulation import Annotators

__all__ = ["CheckOptions", "ExportOptions", "ServeOptions", "SimulateOptions", "check", "export", "serve", "simulate"]


@dataclass(frozen=True)
class ExportOptions:
    """What `export` and `import` take on the command line.

    Attributes:
        layout: records, or pairs, labels or demonstrations as TRL has them.
        chat: write texts as conversations.
        implicit: of pairs, put the prompt in front of both sides and not in a column of its own.
        lossy: leave out what the layout cannot hold.
    """

    layout: str = "records"
    chat: bool = False
    implicit: bool = False
    lossy: bool = False


@dataclass(frozen=True)
class CheckOptions:
    """What `check` takes on the command line: nothing."""


@dataclass(frozen=True)
class SimulateOptions(Annotators):
    """What `simulate` takes on the command line.

    Attributes:
        task: whose gold reward is the hidden score; the one that the records name where it is empty.
        score: a function package.module:function, or a column of K numbers, instead of a task.
    """

    task: str = ""
    score: str = ""


def export(source: str, target: str, options: ExportOptions) -> None:
    """Writes the records of a file in another way."""
    _check_apart(source, target)
    rows = write_records(
        target,
        read_records(source),
        options.layout,
        chat=options.chat,
        implicit=options.implicit,
        lossy=options.lossy,
    )
    print(f"{target}: {rows:,} rows.")


def check(source: str, _: CheckOptions) -> None:
    """Reads a file and says what is in it."""
    kinds = Counter(
        "nobody has judged" if record.judgement is None else record.judgement.kind for record in read_records(source)
    )
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    print(f"{source}: {kinds.total():,} records, all of them good{': ' * bool(counts)}{counts}.")


def simulate(source: str, *rest: object) -> None:
    """Writes what simulated people say of the records of a file."""
    *targets, options = rest
    assert isinstance(options, SimulateOptions)
    target = str(targets[0]) if targets else "prefs.jsonl"
    _check_apart(source, target)
    from lmgym.feedback.scoring import score_records

    people = Annotators(**{item.name: getattr(options, item.name) for item in fields(Annotators)})
    scored = score_records(read_records(source), options.task, options.score)
    rows = write_records(target, people.judge(scored))
    print(f"{target}: {rows:,} judgements of {people.annotators} simulated annotators.")


def _check_apart(source: str, target: str) -> None:
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InvalidArgumentError(f"`TARGET` must be another file than the one that is read, got {target!r} twice.")
