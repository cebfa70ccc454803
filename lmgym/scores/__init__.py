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
from lmgym.scores.bands import Band, performance_profiles
from lmgym.scores.curves import Curve, ScoreCurves, SolveTime, efficiency_curves, solve_times, solved_at
from lmgym.scores.gain import normalised, reference_return
from lmgym.scores.improvement import probability_of_improvement
from lmgym.scores.matrix import ScoreMatrix
from lmgym.scores.pairs import PairComparison, compare_pairs, holm, permutation_p_value
from lmgym.scores.power import PowerTable, power_table
from lmgym.scores.runs import (
    ToleranceInterval,
    WorstRun,
    failure_rates,
    share_interval,
    student_interval,
    task_intervals,
    tolerance_interval,
    worst_runs,
)
from lmgym.scores.sequential import SequentialPlan, SequentialResult, Verdict, sequential_test

__all__ = [
    "STATISTICS",
    "Band",
    "Curve",
    "PairComparison",
    "PowerTable",
    "ScoreCurves",
    "ScoreMatrix",
    "SequentialPlan",
    "SequentialResult",
    "SolveTime",
    "ToleranceInterval",
    "Verdict",
    "WorstRun",
    "aggregate",
    "aggregate_gap",
    "compare_pairs",
    "efficiency_curves",
    "failure_rates",
    "holm",
    "interquartile_mean",
    "mean_score",
    "median_score",
    "normalised",
    "optimality_gap",
    "performance_profiles",
    "permutation_p_value",
    "power_table",
    "probability_of_improvement",
    "reference_return",
    "sequential_test",
    "share_interval",
    "solve_times",
    "solved_at",
    "student_interval",
    "task_intervals",
    "tolerance_interval",
    "worst_runs",
]
