"""Scores that compare across tasks, and the statistics that compare algorithms by them (docs/statistics.md).

`ScoreMatrix` holds one score a run, under the names of its label, its task and its seed. The functions take it whole.
What is random takes a `numpy.random.Generator`: the same generator gives the same numbers.
"""

from lmgym.scores.aggregates import (
    STATISTICS,
    aggregate,
    aggregate_gap,
    interquartile_mean,
    mean_score,
    median_score,
    optimality_gap,
)
from lmgym.scores.gain import normalised, reference_return
from lmgym.scores.improvement import probability_of_improvement
from lmgym.scores.matrix import ScoreMatrix

__all__ = [
    "STATISTICS",
    "ScoreMatrix",
    "aggregate",
    "aggregate_gap",
    "interquartile_mean",
    "mean_score",
    "median_score",
    "normalised",
    "optimality_gap",
    "probability_of_improvement",
    "reference_return",
]
