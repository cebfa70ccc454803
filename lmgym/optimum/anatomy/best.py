"""The best responses to a prompt, those with its highest score, without writing all responses down.

Shapes: X prompts, n those of one solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.optimum.answer import Optimum
from lmgym.optimum.automaton import AutomatonPolicy, AutomatonSolution
from lmgym.optimum.verifiable import VerifiablePolicy
from lmgym.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Best:
    """Of each of X prompts, (X,) float64 each.

    Attributes:
        scores: the highest that any response has.
        reference: the probability of the responses with that score, under the reference. optimal: under pi*.
    """

    scores: Tensor
    reference: Tensor
    optimal: Tensor


def find_best(optimum: Optimum, task: Task) -> Best | None:
    """The best responses of a task that was solved by an automaton or in closed form; None where it does not tell."""
    policy = optimum.policy
    if isinstance(policy, VerifiablePolicy):
        ones = torch.ones_like(optimum.values)
        return Best(ones, optimum.references, _tilt(optimum.references, ones, optimum.values, task.kl_coef))
    if not isinstance(policy, AutomatonPolicy):
        return None
    columns = torch.zeros((3, len(optimum.values)), dtype=torch.float64)
    for solution in policy.solutions:
        own = best_of_solution(solution)
        if own is None:
            return None
        columns[:, solution.prompts] = torch.stack([own.scores, own.reference, own.optimal])
    return Best(*columns)


def best_of_solution(solution: AutomatonSolution) -> Best | None:
    """The same of the n prompts of one automaton; None at gamma < 1, and where it pays for tokens on the way."""
    mdp = solution.mdp
    if mdp.task.gamma < 1 or mdp.pays_tokens:
        return None
    scores, reference = solution.score_distribution()
    highest = len(scores) - 1 - (reference > 0).flip(1).long().argmax(1)
    mass = reference.gather(1, highest.unsqueeze(1)).squeeze(1)
    return Best(scores[highest], mass, _tilt(mass, scores[highest], solution.roots(), mdp.task.kl_coef))


def _tilt(reference: Tensor, scores: Tensor, values: Tensor, kl_coef: float) -> Tensor:
    """What pi* gives to responses of one score that have such a mass under the reference: by docs/optimum.md, (3)."""
    return reference * ((scores - values) / kl_coef).exp()
