"""Exact instruments: what a loss does in expectation, how noisy it is, and where it ends (docs/exact.md)."""

from agents.exact.estimators import TableEstimators
from agents.exact.fixed_point import FixedPoint, find_fixed_point
from agents.exact.table import TablePolicy, make_table_agent
from agents.exact.updates import Updates, enumerate_updates, exact_gradient, expected_update, measure_updates

__all__ = [
    "FixedPoint",
    "TableEstimators",
    "TablePolicy",
    "Updates",
    "enumerate_updates",
    "exact_gradient",
    "expected_update",
    "find_fixed_point",
    "make_table_agent",
    "measure_updates",
]
