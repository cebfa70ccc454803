"""Which completions the members of an ensemble disagree about, so that people are asked about those.

Shapes: E members; K completions of a record.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.records import Record
from lmgym.feedback.rendering import render_record
from lmgym.feedback.store import COLUMN
from lmgym.reward_models.scorer import score_texts
from lmgym.rewards.classifier import ClassifierReward
from lmgym.rewards.ensemble import EnsembleReward

_BATCH = 64  # records that are scored at once


def margin_spread(scores: NDArray[np.float64]) -> float:
    """How far members disagree about an order: the standard deviation of s_i - s_j over them, the mean over all pairs.

    A member whose scores are all higher by the same number does not disagree.

    Args:
        scores: (E, K), two of each at least.
    """
    first, second = np.triu_indices(scores.shape[1], 1)
    margins = scores[:, first] - scores[:, second]
    return float(margins.std(axis=0, ddof=1).mean())


def most_disputed(spreads: Sequence[float], count: int) -> list[int]:
    """The positions of the `count` greatest numbers, greatest first; of equal ones the first."""
    order: list[int] = np.argsort(-np.asarray(spreads), kind="stable").tolist()
    return order[:count]


def measure_disagreement(records: Sequence[Record], ensemble: EnsembleReward) -> list[float]:
    """The `margin_spread` of each record.

    Args:
        records: of two completions each at least. ensemble: of reward models.

    Raises:
        InvalidArgumentError: for a member that is no reward model, and for a text that one cannot read.
    """
    if not records:
        return []
    scores = np.array([_score_completions(records, member) for member in ensemble.rewards])
    ends = np.cumsum([len(record.completions) for record in records])
    return [margin_spread(part) for part in np.split(scores, ends[:-1], axis=1)]


def add_disagreement(records: Iterable[Record], ensemble: EnsembleReward) -> Iterator[Record]:
    """Yields the records with their `margin_spread` in the column that the labelling page goes by.

    Args:
        records: as for `measure_disagreement`; read as they are wanted. ensemble: of reward models.
    """
    rest = iter(records)
    while batch := list(itertools.islice(rest, _BATCH)):
        for record, spread in zip(batch, measure_disagreement(batch, ensemble), strict=True):
            yield replace(record, columns={**record.columns, COLUMN: spread})


def _score_completions(records: Sequence[Record], member: object) -> list[float]:
    """The scores of all completions of some records, of texts as the member was trained to read them."""
    if not isinstance(member, ClassifierReward):
        raise InvalidArgumentError(f"`ensemble` must have reward models alone, got {type(member).__name__}.")
    texts = []
    for record in records:
        rendered = render_record("records", record, member.tokenizer, f"record {record.id!r}")
        texts += [f"{rendered.prompt}{completion.text}" for completion in rendered.completions]
    scores: list[float] = score_texts(member.model, member.tokenizer, texts).tolist()
    return scores
