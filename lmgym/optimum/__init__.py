"""The known optimum of a task, and bounds on it (docs/optimum.md)."""

from lmgym.optimum.answer import Optimum
from lmgym.optimum.find import find_optimum
from lmgym.optimum.solve import best_response, find_known, solve

__all__ = ["Optimum", "best_response", "find_known", "find_optimum", "solve"]
