"""How good the answers are: agreement with others, with known answers and with oneself, for whoever asks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmgym.feedback.agreement import count_agreeing_pairs, krippendorff_alpha, ranking_alpha
from lmgym.feedback.labelling.answers import to_ranks
from lmgym.feedback.labelling.assignment import Assignment
from lmgym.feedback.records import Judgement, Ratings

Ranks = list[int | None]


@dataclass
class Share:
    """How many pairs of responses were ordered alike, of those that both sides ordered."""

    agreeing: int = 0
    pairs: int = 0

    def add(self, first: Ranks, second: Ranks) -> None:
        """Counts the pairs of two rankings."""
        agreeing, pairs = count_agreeing_pairs(first, second)
        self.agreeing += agreeing
        self.pairs += pairs


@dataclass
class Quality:
    """What is known of one annotator's answers.

    Attributes:
        verdicts: how many answers there are of each sort.
        seconds: that each judgement took.
        with_others: agreement with other annotators on the same items.
        with_gold: with known answers.
        with_self: with the annotator's first answer, on repeated items.
    """

    verdicts: dict[str, int] = field(default_factory=lambda: {"judged": 0, "cannot_say": 0, "skip": 0})
    seconds: list[float] = field(default_factory=list)
    with_others: Share = field(default_factory=Share)
    with_gold: Share = field(default_factory=Share)
    with_self: Share = field(default_factory=Share)


def report_quality(answers: Iterable[Assignment], gold: Mapping[str, Judgement]) -> dict[str, Any]:
    """Alpha of all answers, and what is known of each annotator's, as JSON.

    Args:
        answers: in the order in which they came.
        gold: the known answers by the id of their item.
    """
    people: dict[str, Quality] = defaultdict(Quality)
    rankings: dict[str, dict[str, Ranks]] = defaultdict(dict)  # of an item, by annotator
    ratings: dict[str, list[Ratings]] = defaultdict(list)
    for answer in answers:
        person = people[answer.annotator]
        person.verdicts[answer.verdict or "skip"] += 1
        if answer.verdict != "judged":
            continue
        person.seconds.append(answer.seconds or 0.0)
        found = (to_ranks(answer.item, judgement) for judgement in answer.judgements)
        ranks = next((ranks for ranks in found if ranks is not None), None)
        if answer.chosen_by not in ("gold", "repeat"):
            ratings[answer.key] += [item for item in answer.judgements if isinstance(item, Ratings)]
        if ranks is None:
            continue
        if answer.chosen_by == "gold":
            person.with_gold.add(ranks, to_ranks(answer.item, gold[answer.key]) or [])
        elif answer.chosen_by == "repeat":
            person.with_self.add(ranks, rankings[answer.key].get(answer.annotator, []))
        else:
            rankings[answer.key][answer.annotator] = ranks
    _compare_people(people, rankings)
    return {
        "items": len(rankings.keys() | ratings.keys()),
        "shared": sum(len(by_person) > 1 for by_person in rankings.values()),
        "alpha_ranks": _number(ranking_alpha(list(by_person.values()) for by_person in rankings.values())),
        "alpha_ratings": _number(krippendorff_alpha(_rating_units(ratings), "interval")),
        "annotators": [_describe(name, person) for name, person in sorted(people.items())],
    }


def _compare_people(people: Mapping[str, Quality], rankings: Mapping[str, Mapping[str, Ranks]]) -> None:
    for by_person in rankings.values():
        for name, ranks in by_person.items():
            for other, theirs in by_person.items():
                if name != other:
                    people[name].with_others.add(ranks, theirs)


def _rating_units(ratings: Mapping[str, list[Ratings]]) -> list[list[float]]:
    """The values that each response was given."""
    units = []
    for given in ratings.values():
        for values in zip(*(rating.values for rating in given), strict=True):
            units.append([value for value in values if value is not None])
    return units


def _describe(name: str, person: Quality) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name, **person.verdicts}
    described["seconds"] = statistics.median(person.seconds) if person.seconds else None
    for column in ("with_others", "with_gold", "with_self"):
        share: Share = getattr(person, column)
        described[column] = {"agreeing": share.agreeing, "pairs": share.pairs}
    return described


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
