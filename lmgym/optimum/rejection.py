"""Exact samples of pi* by rejection, at gamma = 1.

Shapes: X prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.errors import LmGymError, check_int
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.optimum.answer import check_bounded
from lmgym.optimum.smc import MAX_PARTICLES_AT_ONCE, encode_prompts, smc
from lmgym.tasks.base import Task


def rejection_samples(
    task: Task,
    split: str,
    max_score: float,
    count: int,
    budget: int,
    generator: torch.Generator,
    prompts: int | None = None,
) -> list[list[tuple[int, ...]]]:
    """Exact samples of pi*(y|x) = pi_ref(y|x) exp((score - V*(x)) / kl_coef), at gamma = 1.

    A response of the reference is accepted with probability exp((score - max_score) / kl_coef), which happens with
    probability exp((V*(x) - max_score) / kl_coef): affordable only where the best score is not rare.

    Args:
        task: the MDP. split: whose prompts.
        max_score: what no score, as paid, is above.
        count: samples a prompt. budget: responses that may be drawn a prompt.
        generator: a CPU generator.
        prompts: the first so many of the split; None is all.

    Returns:
        `count` independent responses, as token ids, for each prompt.

    Raises:
        LmGymError: if a score is above `max_score`, or if the budget did not give every prompt its samples.
    """
    check_bounded(task)
    lm = task.reference("cpu")
    encoded = encode_prompts(task, split, prompts, lm)
    log_caps = torch.full((len(encoded),), max_score / task.kl_coef, dtype=torch.float64)
    found = accept(task, encoded, CausalPolicy(lm), log_caps, count, budget, generator)
    highest = task.kl_coef * (found.excess.max().item() + max_score / task.kl_coef)
    if highest > max_score + 1e-9:
        raise LmGymError(f"`max_score` must be what no score is above, got {max_score}, and saw a score of {highest}.")
    check_enough(found, count, budget, f"scores near `max_score` {max_score} are too rare under the reference.")
    return found.responses


@dataclass(frozen=True, eq=False)
class Accepted:
    """The responses that rejection accepted.

    Attributes:
        responses: of each of X prompts, at most as many as were asked for. log_weights: of each of them, nats.
        excess: (X,) nats, the largest log-weight seen less the cap.
    """

    responses: list[list[tuple[int, ...]]]
    log_weights: list[list[float]]
    excess: Tensor


def accept(
    task: Task,
    prompt_ids: Sequence[Sequence[int]],
    proposal: Policy,
    log_caps: Tensor,
    count: int,
    budget: int,
    generator: torch.Generator,
) -> Accepted:
    """Rejection sampling: accepts a response y of the proposal q with probability min(1, w(y) / cap).

    With w = pi_ref(y|x) exp(score / kl_coef) / q(y|x), accepted responses have the distribution
    q min(w, cap) / E_q min(w, cap). That is pi* where no weight is above the cap.

    Args:
        task: the MDP. prompt_ids: X prompts. proposal: q.
        log_caps: (X,) nats. count: responses wanted of each prompt. budget: responses that may be drawn of each.
        generator: a CPU generator.
    """
    check_int("count", count, 1)
    check_int("budget", budget, count)
    responses: list[list[tuple[int, ...]]] = [[] for _ in prompt_ids]
    log_weights: list[list[float]] = [[] for _ in prompt_ids]
    log_caps = log_caps.double()
    excess = torch.full_like(log_caps, -math.inf)
    wanting = list(range(len(prompt_ids)))
    drawn = 0
    while wanting and drawn < budget:
        draws = min(max(1, MAX_PARTICLES_AT_ONCE // len(wanting)), budget - drawn)
        got = smc(task, [prompt_ids[x] for x in wanting], proposal, draws, generator, resample_at=0)
        over = got.log_weights - log_caps[wanting, None]
        excess[wanting] = torch.maximum(excess[wanting], over.amax(1))
        uniforms = torch.rand(over.shape, generator=generator, dtype=torch.float64)
        for i, s in (uniforms < over.exp()).nonzero().tolist():
            x = wanting[i]
            if len(responses[x]) < count:
                responses[x].append(got.response(i, s))
                log_weights[x].append(got.log_weights[i, s].item())
        drawn += draws
        wanting = [x for x in wanting if len(responses[x]) < count]
    return Accepted(responses, log_weights, excess)


def check_enough(found: Accepted, count: int, budget: int, cause: str) -> None:
    """Raises `LmGymError` unless every prompt has its `count` responses."""
    wanting = [x for x, responses in enumerate(found.responses) if len(responses) < count]
    if wanting:
        none = [x for x in wanting if not found.responses[x]]
        raise LmGymError(
            f"`budget` must give every prompt {count} samples of the optimal policy, and {budget} responses a prompt "
            f"gave fewer to prompts {wanting}, and none to prompts {none}: {cause} More budget may do, or a lower "
            "maximum that still holds."
        )
