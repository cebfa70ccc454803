"""V*, J and its gradient of a task with few responses, by writing every response down: exact, and slow."""

from lmgym.optimum.tree.evaluation import TreeEvaluation
from lmgym.optimum.tree.logits import EpisodeLogits, make_episode_logits
from lmgym.optimum.tree.policy import TreePolicy
from lmgym.optimum.tree.shape import count_responses
from lmgym.optimum.tree.tree import Tree, solve_tree

__all__ = [
    "EpisodeLogits",
    "Tree",
    "TreeEvaluation",
    "TreePolicy",
    "count_responses",
    "make_episode_logits",
    "solve_tree",
]
