"""What an annotator entered on the labelling page, as judgements of the record, and back.

Legend: K responses of an item. `shown` is a permutation: the response at position p of the page is `shown[p]` of the
item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmgym.errors import InvalidArgumentError, check_choice, check_int
from lmgym.feedback.comparisons import ranked
from lmgym.feedback.records import Correction, Judgement, Message, Ranking, Ratings, Record, Skip, Text

VERDICTS = ("judged", "cannot_say", "skip")
ASKS = ("rank", "rate", "edit")
MAX_RESPONSES = 26  # a letter each
MAX_RATINGS = 11
MAX_CORRECTION = 200_000  # characters

Ranks = Sequence[int | None]


@dataclass(frozen=True)
class Questions:
    """What the page asks about every item.

    Attributes:
        ask: of "rank", "rate" and "edit"; a correction is always optional beside another question.
        scale: the lowest and the highest rating.
    """

    ask: tuple[str, ...] = ("rank", "edit")
    scale: tuple[int, int] = (1, 7)

    def __post_init__(self) -> None:
        if not self.ask:
            raise InvalidArgumentError(f"`ask` must be some of {list(ASKS)}, got nothing.")
        for name in self.ask:
            check_choice("ask", name, ASKS)
        low, high = self.scale
        check_int("scale[0]", low, 0)
        check_int("scale[1]", high, low + 1, low + MAX_RATINGS - 1)


@dataclass(frozen=True)
class Entered:
    """What was entered for the K responses, in the order of the page.

    Attributes:
        ranks: 1 the best, equal ones a tie, None for not ranked.
        ratings: on the scale, or None.
        corrections: texts, None where nothing was corrected.
    """

    ranks: Ranks | None = None
    ratings: Ranks | None = None
    corrections: Sequence[str | None] | None = None


def read_answer(questions: Questions, item: Record, shown: Sequence[int], entered: Entered) -> tuple[Judgement, ...]:
    """The judgements that an annotator entered; the responses in them are those of the item.

    Raises:
        InvalidArgumentError: for what was not asked, does not fit the item, or says nothing.
    """
    judgements: list[Judgement] = []
    for name, values in (("rank", entered.ranks), ("rate", entered.ratings), ("edit", entered.corrections)):
        if values is not None and name not in questions.ask:
            raise InvalidArgumentError(f"The page does not ask to {name}.")
        if values is not None and len(values) != len(shown):
            raise InvalidArgumentError(f"There must be {len(shown)} values to {name}, got {len(values)}.")
    if "rank" in questions.ask:
        judgements.append(_read_ranks(shown, entered.ranks or ()))
    if "rate" in questions.ask:
        judgements.append(_read_ratings(questions, shown, entered.ratings or ()))
    judgements += _read_corrections(item, shown, entered.corrections or ())
    if not judgements:
        raise InvalidArgumentError("Correct a text, or choose that you cannot say.")
    return tuple(judgements)


def _read_ranks(shown: Sequence[int], ranks: Ranks) -> Ranking:
    tiers: dict[int, list[int]] = {}
    for response, rank in zip(shown, ranks, strict=False):
        if rank is not None:
            check_int("ranks", rank, 1, len(shown))
            tiers.setdefault(rank, []).append(response)
    if sum(len(tier) for tier in tiers.values()) < 2:
        raise InvalidArgumentError("Rank at least two responses, or choose that you cannot say.")
    return Ranking(tuple(tuple(sorted(tiers[rank])) for rank in sorted(tiers)))


def _read_ratings(questions: Questions, shown: Sequence[int], ratings: Ranks) -> Ratings:
    values: dict[int, int] = {}
    for response, value in zip(shown, ratings, strict=False):
        check_int("ratings", value, *questions.scale)
        values[response] = value  # type: ignore[assignment]
    if len(values) != len(shown):
        raise InvalidArgumentError("Rate every response, or choose that you cannot say.")
    return Ratings(tuple(values[i] for i in range(len(shown))), *questions.scale)


def _read_corrections(item: Record, shown: Sequence[int], corrections: Sequence[str | None]) -> list[Correction]:
    found = []
    for response, text in sorted(zip(shown, corrections, strict=False), key=lambda pair: pair[0]):
        if text is None:
            continue
        if not text or len(text) > MAX_CORRECTION:
            raise InvalidArgumentError(
                f"A correction must have between 1 and {MAX_CORRECTION:,} characters, got {len(text):,}."
            )
        found.append(Correction(response, _correct(item.completions[response].text, text)))
    return found


def _correct(original: Text, text: str) -> Text:
    """The corrected text, as a message where the original is one."""
    if isinstance(original, str):
        return text
    if len(original) != 1:
        raise InvalidArgumentError("A response of several messages cannot be corrected here.")
    return (Message(original[0].role, text),)


def to_ranks(item: Record, judgement: Judgement) -> list[int | None] | None:
    """(K,) ranks that a judgement gives the responses of an item, 1 the best; None if it orders none of them."""
    ordered = ranked(replace(item, judgement=judgement))
    if isinstance(judgement, Correction) or ordered is None or not isinstance(ordered.judgement, Ranking):
        return None
    ranks: list[int | None] = [None] * len(item.completions)
    for rank, tier in enumerate(ordered.judgement.tiers, start=1):
        for response in tier:
            ranks[response] = rank
    return ranks


def show_answer(item: Record, shown: Sequence[int], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What was entered, in the order of the page: `Entered` as JSON, for an annotator who changes an answer."""
    entered: dict[str, Any] = {}
    corrections: list[str | None] = [None] * len(shown)
    for judgement in judgements:
        if isinstance(judgement, Ranking):
            ranks = to_ranks(item, judgement) or []
            entered["ranks"] = [ranks[response] for response in shown]
        elif isinstance(judgement, Ratings):
            entered["ratings"] = [judgement.values[response] for response in shown]
        elif isinstance(judgement, Correction):
            text = judgement.text if isinstance(judgement.text, str) else judgement.text[0].content
            corrections[shown.index(judgement.index)] = text
            entered["corrections"] = corrections
    return entered


def skip_of(verdict: str) -> Skip:
    """The judgement of an annotator who does not judge."""
    return Skip("cannot say" if verdict == "cannot_say" else "skipped")
