"""The languages that rewards pay for and solvers solve (docs/optimum.md)."""

from lmgym.automata.automaton import Automaton
from lmgym.automata.builders import bounded_stack, length, phrases, positions
from lmgym.automata.regex import from_regex

__all__ = ["Automaton", "bounded_stack", "from_regex", "length", "phrases", "positions"]
