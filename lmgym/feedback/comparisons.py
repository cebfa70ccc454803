"""What learning reads in a judgement of any kind: an order of the completions, pairs of them, and demonstrations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lmgym.feedback.judgements import Choice, Correction, Ranking, Ratings, Votes
from lmgym.feedback.records import Completion, Record


class Pair(NamedTuple):
    """A completion that was preferred to another.

    Attributes:
        better: its index. worse: index of the other.
        tie: neither was preferred; which of the two is called the better one means nothing.
        strength: how much better, in the units of the judgement: of a choice its strength, of ratings and of votes the
            difference; None where the judgement does not say. 0 of a tie.
    """

    better: int
    worse: int
    tie: bool = False
    strength: float | None = None


def ranked(record: Record) -> Record | None:
    """The same record with a ranking for its judgement; None where the judgement says nothing of any two completions.

    A corrected text becomes one more completion, the last, better than the one that was edited.
    """
    judgement = record.judgement
    if isinstance(judgement, Ranking):
        return record
    if isinstance(judgement, Choice):
        both = (judgement.preferred, judgement.other)
        tiers = (both,) if judgement.strength == 0 else ((judgement.preferred,), (judgement.other,))
        return replace(record, judgement=Ranking(tiers))
    if isinstance(judgement, Correction):
        edited = record.completions[judgement.index]
        if judgement.text == edited.text:
            return None
        corrected = Completion(judgement.text, policy=record.annotator, ended=True)
        completions = (*record.completions, corrected)
        return replace(
            record, completions=completions, judgement=Ranking(((len(completions) - 1,), (judgement.index,)))
        )
    scores = scores_of(record)
    return None if len(scores) < 2 else replace(record, judgement=Ranking(_tiers_of(scores)))


def scores_of(record: Record) -> Mapping[int, float]:
    """The number that ratings or votes give to completions, by index; none where the judgement has no numbers."""
    judgement = record.judgement
    if isinstance(judgement, Ratings):
        return {i: value for i, value in enumerate(judgement.values) if value is not None}
    if isinstance(judgement, Votes):
        return dict(enumerate(judgement.scores()))
    return {}


def _tiers_of(scores: Mapping[int, float]) -> tuple[tuple[int, ...], ...]:
    """Indices in groups of equal scores, the highest first."""
    groups: dict[float, list[int]] = {}
    for index, score in scores.items():
        groups.setdefault(score, []).append(index)
    return tuple(tuple(groups[score]) for score in sorted(groups, reverse=True))


def pairs_of(record: Record) -> list[Pair]:
    """Every pair of completions that a judgement compares, ties too; the indices are those of `ranked(record)`."""
    order = ranked(record)
    if order is None:
        return []
    assert isinstance(order.judgement, Ranking)
    return [_with_strength(record, pair) for pair in pairs_of_tiers(order.judgement.tiers)]


def pairs_of_tiers(tiers: Sequence[Sequence[int]]) -> list[Pair]:
    """Every pair of the completions in groups, the best group first: n (n - 1) / 2 of n completions."""
    pairs = []
    for position, group in enumerate(tiers):
        pairs += [Pair(better, worse, tie=True) for better, worse in itertools.combinations(group, 2)]
        below = [index for lower in tiers[position + 1 :] for index in lower]
        pairs += [Pair(better, worse) for better, worse in itertools.product(group, below)]
    return pairs


def _with_strength(record: Record, pair: Pair) -> Pair:
    if pair.tie:
        return pair._replace(strength=0.0)
    if isinstance(record.judgement, Choice):
        return pair._replace(strength=record.judgement.strength)
    scores = scores_of(record)
    return pair._replace(strength=scores[pair.better] - scores[pair.worse]) if scores else pair


def demonstrations_of(record: Record) -> list[Completion]:
    """What to imitate: the corrected text, or the completions that nothing was preferred to and that beat another.

    Of a record that prefers nothing, a tie of all or one alone, there is nothing to imitate.
    """
    if isinstance(record.judgement, Correction):
        return [Completion(record.judgement.text, policy=record.annotator, ended=True)]
    order = ranked(record)
    if order is None:
        return []
    assert isinstance(order.judgement, Ranking)
    tiers = order.judgement.tiers
    return [order.completions[index] for index in tiers[0]] if len(tiers) > 1 else []
