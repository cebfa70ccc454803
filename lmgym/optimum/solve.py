"""One question, `solve(task)`, and whichever solver can answer it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lmgym.models.markov import MarkovLM
from lmgym.optimum.answer import Optimum, check_solvable, expected_reward
from lmgym.optimum.automaton import AutomatonPolicy, solve_automaton
from lmgym.optimum.tree import Tree, solve_tree
from lmgym.optimum.verifiable import solve_verifiable
from lmgym.rewards.automaton import AutomatonReward
from lmgym.rewards.base import is_import_path
from lmgym.rewards.reading import ModelReward
from lmgym.tasks.base import Task, check_split
from lmgym.tasks.registry import make_task
from lmgym.tasks.stored import StoredOptimum


def solve(
    task: str | Task,
    *,
    split: str = "test",
    kl_coef: float | None = None,
    gamma: float | None = None,
    limit: int = 2_000_000,
) -> Optimum:
    """The optimum of a task, exactly.

    The solver is dynamic programming if the reference is a table and the reward an automaton; a closed form if the
    reward is 1 for a known set of responses and 0 for all others; else the enumeration of all responses.

    Args:
        task: a name, or a Task.
        split: which of its prompts V* is the mean over.
        kl_coef: instead of the task's own price of a nat.
        gamma: instead of the task's own discount.
        limit: how many responses may be enumerated.

    Raises:
        InvalidArgumentError: at `kl_coef=0`, and for a task with more responses than `limit`;
            `lmgym.optimum.importance.importance_bounds` bounds its optimum from samples.
        UnknownNameError: for a name that is none.
    """
    task = make_task(task, kl_coef=kl_coef, gamma=gamma)
    check_split(task, split)
    check_solvable(task)
    solver = find_shortcut(task, split)
    return solve_tree(task, split, limit=limit) if solver is None else solver(task, split)


def best_response(task: str | Task, *, split: str = "test", limit: int = 2_000_000) -> Tensor:
    """(X,) float64: max over y of J(y|x) of each prompt, the most that a deterministic policy earns.

    Such a policy has log pi = 0, so that J(y|x) is score + kl_coef log pi_ref(y|x) at gamma = 1. V*(x) is
    kl_coef log sum_y exp(J(y|x) / kl_coef), so the best response is below V*(x): by kl_coef log n if n responses are
    equally good and all others count for nothing.

    Args:
        task: a name, or a Task. split: which of its prompts. limit: how many responses may be enumerated.

    Raises:
        InvalidArgumentError: at `kl_coef=0`; and for a task with more responses than `limit`, unless its reference is a
            table, not of the largest, and its reward an automaton.
        UnknownNameError: for a name that is none.
    """
    task = make_task(task)
    check_split(task, split)
    check_solvable(task)
    if find_shortcut(task, split) is not solve_automaton:
        return Tree.of(task, split, limit).best_response()
    return AutomatonPolicy(task).best_responses(task.reference("cpu").encode_all(tuple(task.prompts[split])))


def find_known(task: Task, split: str) -> StoredOptimum | None:
    """The stored optimum of a task; or that of a solver that does not enumerate all responses; or None."""
    if split in task.optima:
        return task.optima[split]
    solver = find_shortcut(task, split) if task.kl_coef > 0 else None
    return None if solver is None else solver(task, split).stored()


def find_shortcut(task: Task, split: str) -> Callable[[Task, str], Optimum] | None:
    """A solver that does not enumerate all responses, or None."""
    is_function = callable(task.reward) or is_import_path(task.reward)
    if not is_function or isinstance(task.reward, ModelReward):
        return None  # a reward model, or a sum of rewards: neither is loaded to find that out
    reward = expected_reward(task)
    if isinstance(reward, AutomatonReward) and isinstance(task.reference("cpu").model, MarkovLM):
        lm = task.reference("cpu")
        payments = [reward.for_prompt(ids).token_payments for ids in lm.encode_all(tuple(task.prompts[split]))]
        # At gamma < 1 the token payments collected so far would have to be part of the state.
        if task.gamma == 1 or not task.dense_kl or not any(paid is not None and paid.any() for paid in payments):
            return solve_automaton
    if hasattr(reward, "accepted_responses") and task.gamma == 1 and not task.missing_eos_penalty:
        return solve_verifiable
    return None
