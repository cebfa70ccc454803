"""Where the gap V* - J of a policy comes from: by step, by state, and by response (docs/anatomy.md)."""

from lmgym.optimum.anatomy.automaton import dissect_automaton
from lmgym.optimum.anatomy.find import dissect_exactly, solve_for_tokens
from lmgym.optimum.anatomy.learning import CriticError, GradientQuality
from lmgym.optimum.anatomy.parts import GapAnatomy, Masses, StateGap, TokenOdds, check_additive
from lmgym.optimum.anatomy.samples import EpisodeGaps, dissect_episodes, gaps_of_episodes
from lmgym.optimum.anatomy.tree import SoftValues, critic_targets, dissect_tree, soft_values, visits

__all__ = [
    "CriticError",
    "EpisodeGaps",
    "GapAnatomy",
    "GradientQuality",
    "Masses",
    "SoftValues",
    "StateGap",
    "TokenOdds",
    "check_additive",
    "critic_targets",
    "dissect_automaton",
    "dissect_episodes",
    "dissect_exactly",
    "dissect_tree",
    "gaps_of_episodes",
    "soft_values",
    "solve_for_tokens",
    "visits",
]
