"""The one format of human feedback: a prompt, K completions of it, and what somebody said of them.

`prompt + completion` is the text that was judged: a completion carries its own leading space, and nothing of a text is
ever changed. `lmgym.feedback.files` reads and writes records, `lmgym.feedback.comparisons` makes of any judgement what
learning needs. This module loads neither torch nor NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from lmgym.errors import InvalidArgumentError, check_bool, check_number, shorten
from lmgym.feedback.fields import (
    Message,
    Text,
    check_index,
    check_json,
    check_range,
    check_sequence,
    check_str,
    check_text,
    set_field,
)
from lmgym.feedback.judgements import KINDS, Choice, Correction, Judgement, Ranking, Ratings, Skip, Votes

__all__ = [
    "Choice",
    "Completion",
    "Correction",
    "Judgement",
    "Message",
    "Ranking",
    "Ratings",
    "Record",
    "Skip",
    "Text",
    "Votes",
    "now",
]

_FIELD_NAMES = ("id", "annotator")


@dataclass(frozen=True)
class Completion:
    """One of the completions of a prompt.

    Attributes:
        text: as it was written, or the messages that answer the prompt's.
        policy: who wrote it: the name of a task's reference, the directory of a run, or a person.
        sampler: how: "temperature=0.7, top_p=0.9".
        log_prob: of all its tokens under what sampled it, nats; None where that is not known, as of the best of n.
        ended: True where it is complete though its text has no EOS, so that training puts one after it; False where it
            was cut by a length limit; None where only its text says so, by the EOS that it ends with or has not.
    """

    text: Text
    policy: str | None = None
    sampler: str | None = None
    log_prob: float | None = None
    ended: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.isascii():
            set_field(self, "text", check_text("text", self.text))
        if self.policy is not None:
            check_str("policy", self.policy)
        if self.sampler is not None:
            check_str("sampler", self.sampler)
        if self.log_prob is not None:
            check_number("log_prob", self.log_prob, -math.inf)
        if self.ended is not None:
            check_bool("ended", self.ended)


@dataclass(frozen=True)
class Record:
    """A prompt, its completions, and one judgement of them; without a judgement, something to be judged.

    Attributes:
        prompt: a text, or the messages of a conversation; the completions are of the same sort.
        completions: K >= 2; ratings, a correction and a skip may be of one alone. Texts become `Completion`s.
        judgement: what was said; None where nobody has been asked.
        id: of the record; a file has each only once.
        annotator: who judged.
        time: when, in ISO 8601 and in UTC: "2026-11-27T03:40:00Z" (`now()`).
        seconds: that it took.
        order_shown: indices of the completions in the order in which they were shown.
        columns: what else was in the row, values of JSON by name: the task, gold scores, notes.

    Raises:
        InvalidArgumentError: naming the field that cannot be so.
    """

    prompt: Text
    completions: tuple[Completion, ...]
    judgement: Judgement | None = None
    id: str | None = None
    annotator: str | None = None
    time: str | None = None
    seconds: float | None = None
    order_shown: tuple[int, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_field(self, "prompt", check_text("prompt", self.prompt))
        given = check_sequence("completions", self.completions)
        set_field(self, "completions", tuple(as_completion(i, item) for i, item in enumerate(given)))
        self._check_texts()
        if self.judgement is not None:
            if not isinstance(self.judgement, tuple(KINDS.values())):
                raise InvalidArgumentError(f"`judgement` must be a judgement or None, got {shorten(self.judgement)}.")
            self.judgement.check(len(self.completions))
        for name in _FIELD_NAMES:
            value = getattr(self, name)
            if value is not None:
                check_str(name, value)
        if self.time is not None and not is_time(self.time):
            raise InvalidArgumentError(
                f"`time` must be a time of ISO 8601 in UTC, such as '2026-11-27T03:40:00Z', got {shorten(self.time)}."
            )
        if self.seconds is not None:
            check_number("seconds", self.seconds, 0)
        if self.order_shown is not None:
            self._check_order(check_sequence("order_shown", self.order_shown))
        if not isinstance(self.columns, Mapping):
            raise InvalidArgumentError(f"`columns` must be a dict, got {shorten(self.columns)}.")
        set_field(self, "columns", dict(self.columns))
        check_json("columns", self.columns)

    def _check_texts(self) -> None:
        least = 2 if self.judgement is None else getattr(self.judgement, "MIN_COMPLETIONS", 2)
        if len(self.completions) < least:
            raise InvalidArgumentError(
                f"`completions` must hold at least {least} completions, got {len(self.completions)}."
            )
        texts = [completion.text for completion in self.completions]
        if isinstance(self.judgement, Correction):
            texts.append(self.judgement.text)
        if any(isinstance(text, str) != isinstance(self.prompt, str) for text in texts):
            raise InvalidArgumentError(
                "`completions` must be texts where `prompt` is a text, and messages where it is messages."
            )

    def _check_order(self, order: tuple[Any, ...]) -> None:
        indices = tuple(check_index(f"order_shown[{i}]", index) for i, index in enumerate(order))
        for index in indices:
            check_range("order_shown", index, len(self.completions))
        if len(set(indices)) != len(indices):
            raise InvalidArgumentError(f"`order_shown` must have each completion once at most, got {list(indices)}.")
        set_field(self, "order_shown", indices)


def as_completion(index: int, item: object) -> Completion:
    """A completion, or the completion of a text; `index` is where it stands, for messages."""
    if isinstance(item, Completion):
        return item
    try:
        return Completion(item)  # type: ignore[arg-type]
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"`completions[{index}]`: {error}") from error


def now() -> str:
    """The time in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_time(value: object) -> bool:
    """Whether a value is a time of ISO 8601 in UTC."""
    try:
        return datetime.fromisoformat(value).utcoffset() == timedelta(0)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
