"""Simulated annotators: they rank responses by a hidden score, with errors.

Shapes: B prompts, K responses a prompt. A ranking is a (B, K) array of response indices, best first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmgym.errors import InvalidArgumentError, check_number


def true_ranking(scores: ArrayLike) -> NDArray[np.int64]:
    """Ranks responses without error.

    Args:
        scores: (B, K) hidden scores; higher is better.

    Returns:
        (B, K) response indices, best first; of equal scores the lower index comes first.
    """
    return np.argsort(-_score_table(scores), axis=1, kind="stable")


def plackett_luce_ranking(scores: ArrayLike, temperature: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Ranks responses as an annotator of the Plackett-Luce model does.

    The annotator picks the best response with probability softmax(scores / temperature), then the best of the rest, and
    so on. Sorting the scores after adding standard Gumbel noise to scores / temperature draws from this distribution at
    once. Every pair of responses then follows Bradley-Terry: P(i before j) = sigmoid((scores_i - scores_j) /
    temperature), as `preference_probability` says, whatever the other K - 2 responses are.

    Args:
        scores: (B, K) hidden scores; higher is better.
        temperature: Noise of the annotator in units of the score, > 0. Near 0 it makes no errors; if large it ranks
            at random.
        rng: Source of the noise.

    Returns:
        (B, K) response indices, best first.
    """
    check_number("temperature", temperature, 0, open_low=True)
    table = _score_table(scores)
    return np.argsort(-(table + temperature * rng.gumbel(size=table.shape)), axis=1, kind="stable")


def preference_probability(scores: ArrayLike, other_scores: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Probability that a response is preferred to another (Bradley-Terry).

    Args:
        scores: Hidden scores, any shape.
        other_scores: Hidden scores of their rivals, a shape that broadcasts with it.
        temperature: Noise of the annotator in units of the score, > 0.

    Returns:
        sigmoid((scores - other_scores) / temperature), the broadcast shape.
    """
    check_number("temperature", temperature, 0, open_low=True)
    margin: Any = (np.asarray(scores, dtype=np.float64) - np.asarray(other_scores, dtype=np.float64)) / temperature
    return 0.5 * (1.0 + np.tanh(0.5 * margin))  # the sigmoid, in the form that cannot overflow


def _score_table(scores: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] < 2:
        raise InvalidArgumentError(f"`scores` must have shape (B, K) with K >= 2, got {table.shape}.")
    if not np.isfinite(table).all():
        raise InvalidArgumentError("`scores` must be finite numbers, got some that are not.")
    return table
