"""Which way of taking a gap apart a task allows."""

from __future__ import annotations

from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler
from lmgym.optimum.anatomy.automaton import dissect_automaton
from lmgym.optimum.anatomy.parts import MOST_STATES, GapAnatomy, check_additive
from lmgym.optimum.anatomy.tree import dissect_tree
from lmgym.optimum.answer import Optimum
from lmgym.optimum.automaton import solve_automaton
from lmgym.optimum.exact import MAX_RESPONSES, make_sampled_logits
from lmgym.optimum.solve import find_shortcut
from lmgym.optimum.tree import Tree, count_responses, solve_tree
from lmgym.tasks.base import Task, check_split


def dissect_exactly(
    policy: Policy,
    task: Task,
    split: str = "test",
    *,
    sampler: Sampler | None = None,
    most: int = MOST_STATES,
    limit: int = MAX_RESPONSES,
) -> GapAnatomy | None:
    """Takes the gap of a policy apart without sampling.

    All responses are written down if there are at most `limit`. Else dynamic programming does it, of policies that are
    functions of the state, where an automaton pays and the reference is a table.

    Args:
        policy: any. task, split: what it is graded on. sampler: what its tokens are drawn with, given its logits.
        most: how many states to list. limit: how many responses may be enumerated, of all prompts together.

    Returns:
        None where it takes samples: `dissect_episodes` with the optimum of `solve_for_tokens`.

    Raises:
        InvalidArgumentError: where the gap is no sum over states, and at `kl_coef=0`.
    """
    check_split(task, split)
    check_additive(task)
    if is_small(task, split, limit):
        tree = Tree.of(task, split, limit)
        return dissect_tree(tree, make_sampled_logits(policy, sampler or Sampler(), task.max_new_tokens), most)
    if sampler in (None, Sampler()) and find_shortcut(task, split) is solve_automaton:
        return dissect_automaton(policy, task, split, most)
    return None


def is_small(task: Task, split: str, limit: int = MAX_RESPONSES) -> bool:
    """Whether there are at most so many responses to all prompts of a split together."""
    return count_responses(task, task.reference("cpu")) * len(task.prompts[split]) <= limit


def solve_for_tokens(task: Task, split: str = "test", limit: int = MAX_RESPONSES) -> Optimum:
    """The optimum of a task with pi*, whose next token can be asked for after any response.

    Args:
        task, split: as for `lmgym.optimum.solve`. limit: how many responses may be enumerated.

    Raises:
        InvalidArgumentError: where pi* is not known token by token, or the gap is no sum over states.
    """
    check_split(task, split)
    check_additive(task)
    solver = find_shortcut(task, split)
    if solver is not None:
        return solver(task, split)
    if not is_small(task, split, limit):
        raise InvalidArgumentError(
            f"The gap of {task.name!r} cannot be taken apart, for pi* is not known token by token. It is where an "
            "automaton pays and the reference is a table, where all responses that are accepted are known, and where "
            f"there are at most {limit:,} responses."
        )
    return solve_tree(task, split, limit)
