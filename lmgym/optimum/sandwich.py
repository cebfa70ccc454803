"""Both bounds on the optimum of any task at gamma = 1: SMC below, conditional SMC above."""

from __future__ import annotations

import math

import torch

from lmgym.errors import LmGymError, check_int
from lmgym.intervals import Interval
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.optimum.answer import Optimum, check_bounded
from lmgym.optimum.rejection import rejection_samples
from lmgym.optimum.smc import Particles, encode_prompts, smc
from lmgym.tasks.base import Task


def sandwich(
    task: Task,
    split: str,
    *,
    proposal: Policy | None = None,
    particles: int = 64,
    repeats: int = 16,
    max_score: float | None = None,
    budget: int = 10_000,
    prompts: int | None = None,
    generator: torch.Generator,
) -> Optimum:
    """Bounds V* of a task from both sides by `smc`, the upper one from exact samples of pi* by rejection.

    `lower` is the low end of the 95 % interval of b E log Z_hat, `upper` the high end of that of its conditional twin,
    and never above `max_score`, which V* cannot pass. The intervals are of the mean over these very prompts: they hold
    the sampling noise of every prompt, as its repeats show it, and no noise of a choice of prompts
    (`Interval.over_repeats`). `values` are the middle of each prompt's two means, or its lower one alone.

    Args:
        task: the MDP, at gamma = 1. split: whose prompts.
        proposal: the reference if None; a trained policy, or a `Mixture` of it with the reference, is much tighter at a
            small `kl_coef`. Of a policy that cannot write all that the reference can, only the lower bound holds.
        particles: S. repeats: independent runs a prompt and side, at least 2.
        max_score: what no score, as paid, is above; None gives no upper bound.
        budget: responses that rejection may draw a prompt for its `repeats` samples.
        prompts: the first so many of the split; None is all.
        generator: a CPU generator.

    Returns:
        An Optimum with method "bounds"; its `references` are the mean scores of `particles * repeats` samples each.

    Raises:
        InvalidArgumentError: unless gamma is 1 and kl_coef > 0.
        LmGymError: if a score is above `max_score`, or if rejection is not affordable.
    """
    check_bounded(task)
    check_int("repeats", repeats, 2)
    lm = task.reference("cpu")
    encoded = encode_prompts(task, split, prompts, lm)
    runs = [ids for ids in encoded for _ in range(repeats)]
    plain = smc(task, runs, CausalPolicy(lm), particles, generator, resample_at=0)
    below = plain if proposal is None else smc(task, runs, proposal, particles, generator)
    sides = [below]
    upper = math.inf
    if max_score is not None:
        _check_max_score(plain, max_score)
        _check_max_score(below, max_score)
        exact = rejection_samples(task, split, max_score, repeats, budget, generator, prompts=prompts)
        retained = [response for responses in exact for response in responses]
        sides.append(smc(task, runs, proposal or CausalPolicy(lm), particles, generator, retained=retained))
        _check_max_score(sides[1], max_score)
    bounds = [task.kl_coef * side.log_z.view(len(encoded), repeats) for side in sides]
    if max_score is not None:
        upper = min(Interval.over_repeats(bounds[1]).high, max_score)
    of_reference = Interval.over_repeats(plain.scores.view(len(encoded), -1))
    return Optimum(
        method="bounds",
        values=torch.stack(bounds).mean((0, 2)),
        references=plain.scores.view(len(encoded), -1).mean(1),
        lower=Interval.over_repeats(bounds[0]).low,
        upper=upper,
        exact=False,
        reference_half_width=of_reference.high - of_reference.mean,
    )


def _check_max_score(found: Particles, max_score: float) -> None:
    highest = found.scores.max().item()
    if highest > max_score:
        raise LmGymError(f"`max_score` must be what no score is above, got {max_score}, and saw a score of {highest}.")
