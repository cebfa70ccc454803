"""V* and pi* where the reference is a `MarkovLM` and an automaton pays: dynamic programming, exact up to rounding.

A state of the MDP is (step t, context, automaton state). The next context and the next automaton state depend on the
action and on one of the two alone, so that a backup is one product of the transition table with (V, S) numbers for each
group of contexts.
"""

from lmgym.optimum.automaton.mdp import AutomatonMDP, Performance, PolicyLogits
from lmgym.optimum.automaton.policy import AutomatonPolicy, solve_automaton
from lmgym.optimum.automaton.reference import ReferenceTable
from lmgym.optimum.automaton.solution import AutomatonSolution

__all__ = [
    "AutomatonMDP",
    "AutomatonPolicy",
    "AutomatonSolution",
    "Performance",
    "PolicyLogits",
    "ReferenceTable",
    "solve_automaton",
]
