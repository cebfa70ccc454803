"""The optimal policy itself, on tasks where a solver can represent it: what every other agent is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agents.fixed import FixedPolicyAgent
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy
from lmgym.optimum import Optimum, solve
from lmgym.tasks.base import Task


class Optimal(FixedPolicyAgent):
    """Samples pi*(a|s) = pi_ref(a|s) exp((Q*(s, a) - V*(s)) / kl_coef) of a task that `lmgym.optimum.solve` can solve.

    Raises:
        InvalidArgumentError: if no solver represents the task's pi*.
    """

    def make_policy(self) -> Policy:
        """pi*, for the prompts of every split."""
        return solve_policy(self.envs.task, prompts_of_all_splits(self.envs.task))[1]


def prompts_of_all_splits(task: Task) -> tuple[str, ...]:
    """Each prompt of a task once."""
    return tuple(dict.fromkeys(text for split in task.prompts.values() for text in split))


def solve_policy(task: Task, prompts: Sequence[str], kl_coef: float | None = None) -> tuple[Optimum, Policy]:
    """The optimum of a task on some prompts, and pi*.

    Args:
        task: of the prompts. kl_coef: instead of its own price of a nat.

    Raises:
        InvalidArgumentError: where no solver represents pi*.
    """
    message = f"`task` must be one whose optimal policy is known, got {task.name!r}."
    try:
        optimum = solve(replace(task, prompts={"all": tuple(prompts)}, optima={}), split="all", kl_coef=kl_coef)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{message} {error}") from error
    if optimum.policy is None:
        raise InvalidArgumentError(message)
    return optimum, optimum.policy
