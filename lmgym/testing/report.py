"""What came of checking a trainer: one line an invariant."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

from lmgym.errors import LmGymError

Status = Literal["ok", "FAILS", "error", "by design", "not checked"]
STATUSES: tuple[Status, ...] = ("ok", "FAILS", "error", "by design", "not checked")


class TrainerError(LmGymError, AssertionError):
    """A trainer breaks an invariant; the message is the report."""


@dataclass(frozen=True)
class Result:
    """One invariant.

    Attributes:
        name: of the invariant. statement: what must hold.
        status: "error" where a function raised; "by design" is a failure that the adapter has announced.
        detail: the largest gap and its tolerance, or why it was not checked.
    """

    name: str
    statement: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """The invariants of a trainer, in their order; `print` shows a table, with what was not checked at its end."""

    trainer: str
    results: tuple[Result, ...]

    def named(self, status: Status) -> list[str]:
        """The names of the invariants with a status."""
        return [result.name for result in self.results if result.status == status]

    @property
    def failures(self) -> list[str]:
        """The names of the invariants that fail or raise, without those that fail by design."""
        return [result.name for result in self.results if result.status in ("FAILS", "error")]

    def __getitem__(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    def __str__(self) -> str:
        counts = [(len(self.named(status)), status) for status in STATUSES]
        lines = [f"{self.trainer}: " + ", ".join(f"{count} {status}" for count, status in counts if count)]
        width = max((len(result.name) for result in self.results), default=0)
        indent = " " * (width + 15)
        unchecked: dict[str, list[str]] = {}
        for result in self.results:
            if result.status == "not checked":
                unchecked.setdefault(result.detail, []).append(result.name)
                continue
            lines.append(f"  {result.status:<9}  {result.name:<{width}}  {result.statement}")
            lines += textwrap.wrap(result.detail, 120, initial_indent=indent, subsequent_indent=indent)
        lines += [f"  not checked: {', '.join(names)} ({reason})" for reason, names in unchecked.items()]
        return "\n".join(lines)
