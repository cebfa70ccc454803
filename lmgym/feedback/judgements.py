"""What a person, or a simulated one, can say about the K completions of a prompt.

Completions are meant by their indices, 0 to K - 1. Every judgement is checked on its own when it is made, and against
its completions by the record that holds it (`lmgym.feedback.records.Record`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmgym.errors import InvalidArgumentError, check_number, shorten
from lmgym.feedback.fields import Text, check_index, check_range, check_sequence, check_str, check_text, set_field


@dataclass(frozen=True)
class Ranking:
    """An order of completions, best first; it may have ties, and leave completions out.

    Attributes:
        tiers: indices in groups, the best group first; those of a group are tied. A completion in no tier is unranked,
            and nothing is known of it.
    """

    tiers: tuple[tuple[int, ...], ...]
    kind: ClassVar[str] = "ranking"
    MIN_COMPLETIONS: ClassVar[int] = 2

    def __post_init__(self) -> None:
        groups = []
        for position, group in enumerate(check_sequence("tiers", self.tiers)):
            name = f"tiers[{position}]"
            groups.append(tuple(check_index(f"{name}[{i}]", v) for i, v in enumerate(check_sequence(name, group))))
        set_field(self, "tiers", tuple(groups))
        ranked = [index for group in groups for index in group]
        if not all(groups) or len(set(ranked)) != len(ranked) or len(ranked) < 2:
            raise InvalidArgumentError(
                "`tiers` must be groups of indices of at least two completions, each in one group alone and no group "
                f"empty, got {shorten(self.tiers)}."
            )

    @classmethod
    def of_order(cls, order: Sequence[int]) -> Ranking:
        """The ranking without ties of indices, best first."""
        return cls(tuple((index,) for index in order))

    def check(self, num_completions: int) -> None:
        """Raises `InvalidArgumentError` for an index out of range."""
        for position, group in enumerate(self.tiers):
            for index in group:
                check_range(f"tiers[{position}]", index, num_completions)


@dataclass(frozen=True)
class Ratings:
    """A number for each completion, on a stated scale.

    Attributes:
        values: (K,) numbers of [low, high], higher is better; None for a completion that was not rated.
        low: the lowest that could be given.
        high: the highest, > low.
    """

    values: tuple[float | None, ...]
    low: float
    high: float
    kind: ClassVar[str] = "ratings"
    MIN_COMPLETIONS: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number("low", self.low, -math.inf)
        check_number("high", self.high, self.low, open_low=True)
        set_field(self, "values", check_sequence("values", self.values))
        for i, value in enumerate(self.values):
            if value is not None:
                check_number(f"values[{i}]", value, self.low, self.high)
        if all(value is None for value in self.values):
            raise InvalidArgumentError(f"`values` must rate a completion at least, got {shorten(self.values)}.")

    def check(self, num_completions: int) -> None:
        """Raises `InvalidArgumentError` unless there is one value, or None, a completion."""
        _check_length("values", self.values, num_completions)


@dataclass(frozen=True)
class Choice:
    """Which of two completions is better, and by how much.

    Attributes:
        preferred: index of the better one.
        other: index of the worse one.
        strength: how much better, > 0, in the units of whoever asked; 0 is a tie; None where nobody asked.
    """

    preferred: int
    other: int
    strength: float | None = None
    kind: ClassVar[str] = "choice"
    MIN_COMPLETIONS: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name in ("preferred", "other"):
            set_field(self, name, check_index(name, getattr(self, name)))
        if self.preferred == self.other:
            raise InvalidArgumentError(f"`preferred` and `other` must be two completions, got {self.other} twice.")
        if self.strength is not None:
            check_number("strength", self.strength, 0)

    def check(self, num_completions: int) -> None:
        """Raises `InvalidArgumentError` for an index out of range."""
        check_range("preferred", self.preferred, num_completions)
        check_range("other", self.other, num_completions)


@dataclass(frozen=True)
class Correction:
    """A completion as the annotator would have it: better than the one that was edited, and a demonstration.

    Attributes:
        index: of the completion that was edited.
        text: what it became; it is complete, whatever the other one was.
    """

    index: int
    text: Text
    kind: ClassVar[str] = "correction"
    MIN_COMPLETIONS: ClassVar[int] = 1

    def __post_init__(self) -> None:
        set_field(self, "index", check_index("index", self.index))
        set_field(self, "text", check_text("text", self.text))

    def check(self, num_completions: int) -> None:
        """Raises `InvalidArgumentError` for an index out of range."""
        check_range("index", self.index, num_completions)


@dataclass(frozen=True)
class Votes:
    """What the visitors of a site voted for each completion, as on Stack Exchange.

    Attributes:
        counts: (K,) votes up minus votes down.
        accepted: index of the one that whoever asked accepted; None for none.
    """

    counts: tuple[int, ...]
    accepted: int | None = None
    kind: ClassVar[str] = "votes"
    MIN_COMPLETIONS: ClassVar[int] = 2

    def __post_init__(self) -> None:
        set_field(self, "counts", check_sequence("counts", self.counts))
        for i, count in enumerate(self.counts):
            if not isinstance(count, int) or isinstance(count, bool):
                raise InvalidArgumentError(f"`counts[{i}]` must be an int, got {shorten(count)}.")
        if self.accepted is not None:
            set_field(self, "accepted", check_index("accepted", self.accepted))

    def check(self, num_completions: int) -> None:
        """Raises `InvalidArgumentError` unless there is one count a completion, and for an index out of range."""
        _check_length("counts", self.counts, num_completions)
        if self.accepted is not None:
            check_range("accepted", self.accepted, num_completions)

    def scores(self) -> tuple[int, ...]:
        """(K,) scores by the rule of StackLLaMA (Beeching et al. 2023): -1 where there are more votes down than up.

        Otherwise round(log2(1 + votes)), and 1 more for the one that was accepted.
        """
        scores = []
        for i, count in enumerate(self.counts):
            score = -1 if count < 0 else round(math.log2(1 + count)) + (i == self.accepted)
            scores.append(score)
        return tuple(scores)


@dataclass(frozen=True)
class Skip:
    """The annotator cannot say, or will not.

    Attributes:
        reason: in the annotator's words; None where nothing was said.
    """

    reason: str | None = None
    kind: ClassVar[str] = "skip"
    MIN_COMPLETIONS: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.reason is not None:
            check_str("reason", self.reason)

    def check(self, num_completions: int) -> None:
        """Any number of completions can be skipped."""


def _check_length(name: str, values: Sequence[Any], num_completions: int) -> None:
    if len(values) != num_completions:
        raise InvalidArgumentError(f"`{name}` must have one entry a completion, {num_completions}, got {len(values)}.")


Judgement = Ranking | Ratings | Choice | Correction | Votes | Skip
KINDS: dict[str, type[Judgement]] = {kind.kind: kind for kind in (Ranking, Ratings, Choice, Correction, Votes, Skip)}
