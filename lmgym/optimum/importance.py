"""Bounds from both sides on the optimum of any task at gamma = 1, by importance sampling from a proposal near pi*.

With b = kl_coef, a proposal q and weights w(y) = pi_ref(y|x) exp(score / b) / q(y|x): E_q w = Z(x), V*(x) = b log Z(x).

1. Below: b E log mean_S w <= V*(x), for S draws of q.
2. Draws of pi*: a draw of q is accepted with probability min(1, w / (c Z')), where Z' is an estimate of Z and c the
   largest ratio of a weight to it that counts in full.
3. Above: b E log mean_S w >= V*(x), where one of the S draws is of pi*.
4. What is cut off. Where larger ratios exist, accepted draws have the distribution q min(w, c Z'), whose normaliser is
   (1 - eps) Z. The cut takes the share eps of pi* away, and V*(x) is b log(1 / (1 - eps)) above 3. The eps of the draws
   of step 1 is added to the bound. What none of them has shown is the assumption, and has that price.

The same draws of q serve both sides.

Shapes: X prompts, R repeats, S draws of a repeat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmgym.errors import check_int, check_number
from lmgym.intervals import Interval
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.optimum.answer import Optimum, check_bounded
from lmgym.optimum.bounds import multi_sample_upper_bound
from lmgym.optimum.rejection import accept, check_enough
from lmgym.optimum.smc import encode_prompts, smc
from lmgym.tasks.base import Task


def importance_bounds(
    task: Task,
    split: str,
    proposal: Policy,
    *,
    draws: int = 128,
    repeats: int = 2,
    pilot_draws: int = 32,
    max_ratio: float = 128.0,
    reference_draws: int = 512,
    budget: int = 100_000,
    prompts: int | None = None,
    generator: torch.Generator,
) -> Optimum:
    """Bounds V* of a task from both sides, the upper one under an assumption that comes with it.

    `lower` and `upper` are the outer ends of the 95 % intervals of the two sides. The intervals are of the mean over
    these very prompts (`Interval.over_repeats`). `values` are the middle of each prompt's two sides.

    Args:
        task: the MDP, at gamma = 1. split: whose prompts.
        proposal: q; must be able to write all that the reference can (`Mixture` with the reference is).
        draws: S. repeats: independent runs a prompt, at least 2.
        pilot_draws: a prompt, for the estimate of Z that `max_ratio` is relative to.
        max_ratio: where w / Z is cut off. About one draw in so many is accepted as one of pi*.
        reference_draws: a prompt, for J of the reference.
        budget: draws a prompt that rejection may take.
        prompts: the first so many of the split; None is all.
        generator: a CPU generator.

    Raises:
        InvalidArgumentError: unless gamma is 1 and kl_coef > 0.
        LmGymError: if rejection keeps too few draws.
    """
    check_bounded(task)
    check_int("draws", draws, 2)
    check_int("repeats", repeats, 2)
    check_int("pilot_draws", pilot_draws, 1)
    check_int("reference_draws", reference_draws, 2)
    check_number("max_ratio", max_ratio, 1)
    lm = task.reference("cpu")
    encoded = encode_prompts(task, split, prompts, lm)
    plain = smc(task, encoded, CausalPolicy(lm), reference_draws, generator, resample_at=0)
    pilot = smc(task, encoded, proposal, pilot_draws, generator, resample_at=0)
    log_caps = pilot.log_z + math.log(max_ratio)
    found = accept(task, encoded, proposal, log_caps, repeats, budget, generator)
    check_enough(found, repeats, budget, "the weights that `max_ratio` allows are too rare under the proposal.")

    runs = [ids for ids in encoded for _ in range(repeats)]
    fresh = smc(task, runs, proposal, draws, generator, resample_at=0)
    weights = fresh.log_weights.view(len(encoded), repeats, draws)
    below = task.kl_coef * fresh.log_z.view(len(encoded), repeats)
    above = multi_sample_upper_bound(weights, torch.tensor(found.log_weights, dtype=torch.float64), task.kl_coef)
    cut_off = share_above(weights, log_caps)
    of_reference = Interval.over_repeats(plain.scores)
    return Optimum(
        method="importance",
        values=(below + above).mean(1) / 2,
        references=plain.scores.mean(1),
        lower=Interval.over_repeats(below).low,
        upper=Interval.over_repeats(above).high + price(task.kl_coef, cut_off),
        exact=False,
        reference_half_width=of_reference.high - of_reference.mean,
        assumption=assumption(task.kl_coef, max_ratio, cut_off),
    )


def share_above(weights: Tensor, log_caps: Tensor) -> float:
    """The share of the weight of the draws (X, R, S) that caps (X,) cut off, the mean over prompts."""
    flat = weights.flatten(1)
    shares = flat.softmax(1)
    excess = 1 - (log_caps[:, None] - flat).exp()
    return (shares * excess.clamp(min=0)).sum(1).mean().item()


def price(kl_coef: float, share: float) -> float:
    """How far V* is above the optimum that is left when a share of pi* is cut off, in units of the score."""
    return -kl_coef * math.log1p(-share)


def assumption(kl_coef: float, max_ratio: float, cut_off: float) -> str:
    """What the upper bound takes for granted, and its price, in words."""
    return (
        f"importance weights above {max_ratio:g} times the mean are cut off, which takes {100 * cut_off:.1f} % of the "
        "optimal policy as the draws show it, and is counted. If responses that no draw has shown take 10 % (50 %) "
        f"more, V* is up to {price(kl_coef, 0.1):.3f} ({price(kl_coef, 0.5):.3f}) higher"
    )
