"""The knobs by which a run is wrong on purpose, checked before torch loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.ranges import (
    Count,
    CountOrZero,
    Decay,
    Finite,
    NonNegative,
    Positive,
    PositiveFraction,
    check_fields,
    check_value,
    number_type,
)

# What a knob may be that is a word, or a word and a number: `top_p:0.9`. None takes no number.
SAMPLER_MISMATCH: dict[str, Any] = {
    "temperature": Positive,
    "top_k": Count,
    "top_p": PositiveFraction,
    "bfloat16": None,
}
CRITIC_VALUES: dict[str, Any] = {"frozen": None, "random": Positive, "exact": None}
REFERENCE_DRIFT: dict[str, Any] = {"ema": Decay, "copy": Count}


@dataclass(frozen=True)
class FaultConfig:
    """How a run is wrong on purpose. None is right, and so is 0."""

    staleness: CountOrZero | None = None  # batches are sampled by the policy of so many updates ago
    sampler_mismatch: str | None = None  # what samples instead: temperature:T, top_k:K, top_p:P or bfloat16
    critic_values: str | None = None  # what advantages are of instead of learned values: frozen, random:SIGMA or exact
    reference_drift: str | None = None  # what the KL is paid to: ema:DECAY of the policy, or a copy:UPDATES of it
    reward_noise: NonNegative | None = None  # standard deviation of noise on the scores that are learned from
    length_bias: Finite | None = None  # is added to these scores for every token
    overlong: str | None = None  # mask: episodes that the length limit has cut are left out of the update

    def __post_init__(self) -> None:
        check_fields(self)
        for name, words in (
            ("sampler_mismatch", SAMPLER_MISMATCH),
            ("critic_values", CRITIC_VALUES),
            ("reference_drift", REFERENCE_DRIFT),
            ("overlong", {"mask": None}),
        ):
            text = getattr(self, name)
            if text is not None:
                parse_setting(name, text, words)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> FaultConfig:
        """The knobs in the config of a run; one that it does not have is off."""
        return cls(**{name: values[name] for name in KNOBS if name in values})

    @property
    def on(self) -> tuple[str, ...]:
        """The names of the knobs that are on."""
        return tuple(name for name in KNOBS if getattr(self, name) not in (None, 0))


KNOBS = tuple(field.name for field in fields(FaultConfig))


def parse_setting(name: str, text: str, words: Mapping[str, Any]) -> tuple[str, Any]:
    """The word and the number of a knob such as `top_p:0.9`; None of a word that has no number.

    Args:
        name: of the knob. text: its value. words: the words that it may be, and the types of their numbers.

    Raises:
        LmGymError: naming the knob.
    """
    word, colon, number = text.partition(":")
    check_choice(name, word, words)
    kind = words[word]
    if (kind is None) == bool(colon):
        wanted = f"{word!r}" if kind is None else f"{word}:NUMBER"
        raise InvalidArgumentError(f"`{name}` must be {wanted}, got {text!r}.")
    if kind is None:
        return word, None
    try:
        value = number_type(kind)(number)
    except ValueError:
        value = number
    check_value(f"{name}={word}", value, kind)
    return word, value
