"""The optimum of any task, as closely as it can be known here: what `Task.optimum` calls."""

from __future__ import annotations

import torch

from lmgym.errors import InvalidArgumentError
from lmgym.intervals import Interval
from lmgym.models.policy import CausalPolicy
from lmgym.optimum.answer import check_solvable
from lmgym.optimum.exact import MAX_RESPONSES
from lmgym.optimum.smc import encode_prompts, smc
from lmgym.optimum.solve import find_known
from lmgym.optimum.tree import count_responses, solve_tree
from lmgym.tasks.base import Task, check_split
from lmgym.tasks.stored import StoredOptimum

EPISODES = 1024  # of the reference, for a bound from below, of all prompts together
MIN_DRAWS = 2  # of a prompt and repeat
REPEATS = 2
SEED = 0
MAX_PROMPTS = 512  # of a larger split the first so many stand for all


def find_optimum(task: Task, split: str = "test") -> StoredOptimum:
    """What is stored; else what a solver finds; else a bound from below, from samples of the reference.

    Args:
        task: any. split: which of its prompts V* is the mean over.

    Raises:
        UnknownNameError: for a split that it does not have.
        InvalidArgumentError: at `kl_coef=0`; and where no solver reaches and a bound does not hold, at gamma < 1 or for
            a reward with noise whose mean is not known.
    """
    check_split(task, split)
    if split in task.optima:
        return task.optima[split]
    check_solvable(task)
    found = find_known(task, split)
    if found is not None:
        return found
    if count_responses(task, task.reference("cpu")) * len(task.prompts[split]) <= MAX_RESPONSES:
        return solve_tree(task, split).stored()
    try:
        return bound_below(task, split)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"The optimum of {task.name!r} is not known: it has too many responses to write down, and a bound from "
            f"samples does not hold. {error}"
        ) from error


def bound_below(task: Task, split: str) -> StoredOptimum:
    """What V* is at least, by kl_coef E log mean exp(score / kl_coef) over samples of the reference.

    It misses rare responses that pay, so that V* may be far above. `lmgym.optimum.importance` draws from a policy near
    pi* instead.
    """
    lm = task.reference("cpu")
    encoded = encode_prompts(task, split, MAX_PROMPTS, lm)
    draws = max(MIN_DRAWS, EPISODES // (REPEATS * len(encoded)))
    repeated = [ids for ids in encoded for _ in range(REPEATS)]
    drawn = smc(task, repeated, CausalPolicy(lm), draws, torch.Generator().manual_seed(SEED), resample_at=0)
    below = task.kl_coef * drawn.log_z.view(-1, REPEATS)
    scores = drawn.scores.view(len(encoded), -1)
    is_whole = len(encoded) == len(task.prompts[split])
    lower, reference = (Interval.over_repeats(x) if is_whole else Interval.of(x.mean(1)) for x in (below, scores))
    value = max(lower.low, reference.mean)
    return StoredOptimum("samples", value, value, None, reference.mean, reference.high - reference.mean)
