"""What is wrong with a file of feedback, all of it in one report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lmgym.errors import InvalidArgumentError


@dataclass(frozen=True)
class Problem:
    """Neighbouring records that cannot be read, for one reason.

    Attributes:
        unit: what is counted: "line" or "row". first: number of the first of them. last: of the last. reason: why.
    """

    unit: str
    first: int
    last: int
    reason: str

    def __str__(self) -> str:
        if self.first == self.last:
            return f"{self.unit} {self.first}: {self.reason}"
        return f"{self.unit}s {self.first} to {self.last}: {self.reason}"


class FeedbackFileError(InvalidArgumentError):
    """A source has records that cannot be read; none of it was taken.

    Attributes:
        problems: every one of them, in the order of the source.
    """

    def __init__(self, message: str, problems: tuple[Problem, ...]) -> None:
        super().__init__(message)
        self.problems = problems


class Problems:
    """Collects the problems of a source.

    Args:
        argument: what the source was given as, for messages.
        source: what it is called: "'prefs.jsonl'".
    """

    def __init__(self, argument: str, source: str) -> None:
        self.argument = argument
        self.source = source
        self._found: list[Problem] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, unit: str, number: int, reason: str) -> None:
        """Notes a record; one that follows another with the same reason joins it."""
        last = self._found[-1] if self._found else None
        if last is not None and (last.unit, last.last + 1, last.reason) == (unit, number, reason):
            self._found[-1] = replace(last, last=number)
        else:
            self._found.append(Problem(unit, number, number, reason))

    def raise_all(self) -> None:
        """Raises `FeedbackFileError` with all that was noted; does nothing where nothing was."""
        if not self._found:
            return
        count = sum(problem.last - problem.first + 1 for problem in self._found)
        bad = "1 bad record" if count == 1 else f"{count:,} bad records"
        lines = "".join(f"\n  {problem}" for problem in self._found)
        raise FeedbackFileError(
            f"`{self.argument}` {self.source} has {bad}, and nothing of it was taken:{lines}", tuple(self._found)
        )
