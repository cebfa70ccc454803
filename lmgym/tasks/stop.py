"""Can the agent choose when to end? A response of n tokens, its EOS included, pays 1 - |n - best| / best.

Which symbols it holds does not matter. The reference ends with probability 0.1 at every step, whatever came before,
and the limit is twice the best length. The knob is the best length: the longer, the more steps at which ending has to
be put off.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lmgym.rewards.automaton import AutomatonReward, length
from lmgym.tasks.base import Task, register_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

BEST = (4, 8, 16, 32)
SYMBOLS = ["a", "b", "c", "d"]
EOS_PROBABILITY = 0.1


@functools.cache
def reference() -> CausalLM:
    """A table of order 0."""
    from lmgym.models.markov import markov_lm

    symbol = (1 - EOS_PROBABILITY) / len(SYMBOLS)
    return markov_lm(np.array([[EOS_PROBABILITY, *[symbol] * len(SYMBOLS)]]), SYMBOLS, order=0)


def stop(best: int) -> Task:
    """The task at one best length."""
    limit = 2 * best
    payments = [1 - abs(n - best) / best for n in range(limit + 1)]
    return Task(
        name=f"stop-{best}",
        model=reference,
        reward=AutomatonReward(length(limit, payments, len(SYMBOLS) + 1)),
        prompts={"train": SYMBOLS, "test": SYMBOLS},
        kl_coef=0.1,
        max_new_tokens=limit,
    )


for _best in BEST:
    register_task(f"stop-{_best}", functools.partial(stop, _best))
