"""Simulated people who judge records, with the faults that real ones have, each a number.

What an annotator feels of a completion, in units of the score, is its *utility*: the hidden score, plus the faults
below, plus noise. Shapes: K completions of a record.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import InvalidArgumentError, check_choice, check_int
from lmgym.feedback.json_form import text_to_json
from lmgym.feedback.records import Choice, Judgement, Ranking, Ratings, Record
from lmgym.ranges import Count, CountOrZero, Finite, Fraction, NonNegative, Positive, Range, check_fields

ASK = ("ranking", "choice", "rating")


@dataclass(frozen=True)
class Annotators:
    """Simulated people. All but `annotators` and the shares are in units of the score.

    Attributes:
        annotators: how many judge each record.
        ask: "ranking" of all completions; "choice" between the two of every pair, each judged anew; "rating" of each.
        temperature: of the noise, which is Gumbel, so that rankings follow Plackett-Luce and pairs Bradley-Terry.
        lapse: share of judgements that are given at random.
        position_bias: added to the completion that is shown first; of a pair to the first of the two.
        length_bias: added for each word of a completion.
        annotator_bias: standard deviation of each annotator's own taste for each completion, the same when asked again.
        intransitive: share of choices that go round in a circle: 0 before 1 before 2 before 0.
        tie_threshold: two completions whose utilities differ by less are tied.
        low: lowest rating.
        high: highest rating.
        rating_center: utility that gets the middle of the scale.
        rating_step: utility from one rating to the next.
        seed: of everything that is drawn. Another number of annotators leaves those before it as they are.
    """

    annotators: Count = 1
    ask: str = "ranking"
    temperature: NonNegative = 1.0
    lapse: Fraction = 0.0
    position_bias: Finite = 0.0
    length_bias: Finite = 0.0
    annotator_bias: NonNegative = 0.0
    intransitive: Fraction = 0.0
    tie_threshold: NonNegative = 0.0
    low: Annotated[int, Range(-(10**6))] = 1
    high: int = 7
    rating_center: Finite = 0.0
    rating_step: Positive = 1.0
    seed: CountOrZero = 0

    def __post_init__(self) -> None:
        check_choice("ask", self.ask, ASK)
        check_fields(self)
        check_int("high", self.high, self.low + 1)
        if self.intransitive and self.ask != "choice":
            raise InvalidArgumentError(
                f"`intransitive` must be 0 where `ask` is {self.ask!r}, which cannot go round in a circle, got "
                f"{self.intransitive:g}: ask=choice can."
            )
        if self.tie_threshold and self.ask == "rating":
            raise InvalidArgumentError("`tie_threshold` must be 0 where `ask` is 'rating': equal ratings are ties.")

    def judge(self, scored: Iterable[tuple[Record, Sequence[float]]]) -> Iterator[Record]:
        """Yields what every annotator says of records.

        Args:
            scored: records, each with the (K,) hidden scores of its completions. A judgement that one has is left out.

        Raises:
            InvalidArgumentError: for scores that are not K finite numbers.
        """
        people = [Annotator(self, number) for number in range(self.annotators)]
        for record, scores in scored:
            utilities = np.asarray(scores, dtype=np.float64)
            if utilities.shape != (len(record.completions),) or not np.isfinite(utilities).all():
                raise InvalidArgumentError(
                    f"`scores` must be {len(record.completions)} finite numbers, one a completion, got {list(scores)}."
                )
            for person in people:
                yield from person.judge(record, utilities)


class Annotator:
    """One simulated person.

    Args:
        traits: how they judge. number: which of them it is.
    """

    def __init__(self, traits: Annotators, number: int) -> None:
        self.traits = traits
        self.name = f"simulated-{number}"
        self._rng = np.random.default_rng([traits.seed, number])
        self._taste_seed = [traits.seed, number, 1]

    def judge(self, record: Record, scores: NDArray[np.float64]) -> Iterator[Record]:
        """Yields a record a judgement: one, or one a pair."""
        traits = self.traits
        felt = scores + traits.length_bias * np.array([_num_words(item.text) for item in record.completions])
        if traits.annotator_bias:
            felt = felt + traits.annotator_bias * np.array([self._taste(record, i) for i in range(len(scores))])
        if traits.ask == "choice":
            for first, second in itertools.combinations(range(len(scores)), 2):
                order = self._rng.permutation([first, second])
                yield self._record(record, self._choose(felt, order), order, f"/{first}-{second}")
            return
        order = self._rng.permutation(len(scores))
        judgement = self._rank(felt, order) if traits.ask == "ranking" else self._rate(felt, order)
        yield self._record(record, judgement, order, "")

    def _record(self, record: Record, judgement: Judgement, order: NDArray[np.int64], part: str) -> Record:
        key = None if record.id is None else f"{record.id}/{self.name}{part}"
        shown = tuple(order.tolist())
        return replace(
            record, judgement=judgement, id=key, annotator=self.name, order_shown=shown, time=None, seconds=None
        )

    def _noisy(self, felt: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
        """(K,) utilities: what is felt, with noise, and a bonus for what is shown first."""
        utilities = felt + self.traits.temperature * self._rng.gumbel(size=len(felt))
        utilities[order[0]] += self.traits.position_bias
        return utilities

    def _rank(self, felt: NDArray[np.float64], order: NDArray[np.int64]) -> Ranking:
        utilities = self._noisy(felt, order)
        if self._rng.random() < self.traits.lapse:
            return Ranking.of_order(self._rng.permutation(len(felt)).tolist())
        tiers: list[list[int]] = []
        for index in np.argsort(-utilities, kind="stable").tolist():
            if tiers and utilities[tiers[-1][-1]] - utilities[index] < self.traits.tie_threshold:
                tiers[-1].append(index)
            else:
                tiers.append([index])
        return Ranking(tuple(map(tuple, tiers)))

    def _choose(self, felt: NDArray[np.float64], order: NDArray[np.int64]) -> Choice:
        """A choice between the two that are shown."""
        low = int(order.min())
        high = int(order.max())
        utilities = self._noisy(felt, order)
        draw = self._rng.random()
        if draw < self.traits.lapse:
            return Choice(*self._rng.permutation([low, high]).tolist())
        if self._rng.random() < self.traits.intransitive:
            return Choice(low, high) if (high - low) % 2 else Choice(high, low)
        margin = utilities[low] - utilities[high]
        if abs(margin) < self.traits.tie_threshold:
            return Choice(low, high, strength=0)
        return Choice(low, high) if margin >= 0 else Choice(high, low)

    def _rate(self, felt: NDArray[np.float64], order: NDArray[np.int64]) -> Ratings:
        traits = self.traits
        utilities = self._noisy(felt, order)
        if self._rng.random() < traits.lapse:
            values = self._rng.integers(traits.low, traits.high + 1, size=len(felt))
        else:
            middle = (traits.low + traits.high) / 2
            values = np.rint(middle + (utilities - traits.rating_center) / traits.rating_step)
            values = np.clip(values, traits.low, traits.high).astype(np.int64)
        return Ratings(tuple(values.tolist()), traits.low, traits.high)

    def _taste(self, record: Record, index: int) -> float:
        """A standard normal number of this annotator for this text, the same each time."""
        text = repr((text_to_json(record.prompt), text_to_json(record.completions[index].text)))
        seed = [*self._taste_seed, *text.encode("utf-8")]
        return float(np.random.default_rng(seed).standard_normal())


def _num_words(text: Any) -> int:
    return len(text.split()) if isinstance(text, str) else sum(len(message.content.split()) for message in text)
