"""The optimal policy itself, on tasks where a solver can represent it: what every other agent is measured against."""

from __future__ import annotations

from dataclasses import replace

from agents.fixed import FixedPolicyAgent
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy
from lmgym.optimum import solve


class Optimal(FixedPolicyAgent):
    """Samples pi*(a|s) = pi_ref(a|s) exp((Q*(s, a) - V*(s)) / kl_coef) of a task that `lmgym.optimum.solve` can solve.

    Raises:
        InvalidArgumentError: if no solver represents the task's pi*.
    """

    def make_policy(self) -> Policy:
        """pi*, for the prompts of every split."""
        task = self.envs.task
        texts = tuple(dict.fromkeys(text for split in task.prompts.values() for text in split))
        policy = solve(replace(task, prompts={"all": texts}), split="all").policy
        if policy is None:
            raise InvalidArgumentError(f"`task` must be one whose optimal policy is known, got {task.name!r}.")
        return policy
