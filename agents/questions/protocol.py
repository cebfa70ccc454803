"""What a question is: how it is measured, the rule of its verdict, and what its page shows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmgym.errors import InvalidArgumentError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent.parent
STUDIES = ROOT / "studies"

Found = Mapping[str, Any]  # JSON values


@dataclass(frozen=True)
class Verdict:
    """What the rule says of data.

    Attributes:
        short: a sentence for the table of all questions.
        claims: sentences, each decided by the rule. They are the same where data of other seeds agree.
    """

    short: str
    claims: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """A question, as its file in `studies/` fixes it before there are data.

    Attributes:
        title: the question. seeds: 10 or more, of the tasks and of the runs.
        measure: gives JSON values, from seeds.
        judge: the rule. texts: what the template's other names stand for, tables among them.
        draw: figures by name.
    """

    title: str
    seeds: Sequence[int]
    measure: Callable[[Sequence[int]], Found]
    judge: Callable[[Found], Verdict]
    texts: Callable[[Found], Mapping[str, str]]
    draw: Callable[[Found], Mapping[str, Figure]]


def list_questions() -> list[str]:
    """The names of all questions."""
    return sorted(path.stem.replace("_", "-") for path in STUDIES.glob("*.py") if path.stem != "__init__")


def load_protocol(question: str) -> Protocol:
    """The protocol of a question.

    Raises:
        UnknownNameError: for a question that there is none of.
    """
    if question not in list_questions():
        raise unknown_name("question", question, list_questions())
    protocol = importlib.import_module(f"studies.{question.replace('-', '_')}").PROTOCOL
    if not isinstance(protocol, Protocol):
        raise InvalidArgumentError(f"`PROTOCOL` of {question} must be a Protocol, got {type(protocol).__name__}.")
    return protocol


def template_of(question: str) -> str:
    """The text around a question's numbers."""
    return (STUDIES / f"{question.replace('-', '_')}.md").read_text(encoding="utf-8")
