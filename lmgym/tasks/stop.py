"""Can the agent choose when to end? A response of n tokens, its EOS included, pays 1 - |n - best| / best.

The symbols of a response do not matter, and the limit is twice the best length. The first knob is the best length: the
longer it is, the more steps the agent has to wait before it ends. The second knob is the probability with which the
reference ends at every step. It is 0.1, or that of the name: `stop-8-0.02` hardly ever ends by itself, and `stop-8-0.5`
hardly ever writes that much.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lmgym.automata import length
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, register_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

BEST = (4, 8, 16, 32)
SYMBOLS = ["a", "b", "c", "d"]
EOS_PROBABILITY = 0.1
OTHER_EOS_PROBABILITIES = (0.02, 0.5)


@functools.cache
def reference(eos_probability: float = EOS_PROBABILITY) -> CausalLM:
    """A table of order 0."""
    from lmgym.models.tables import markov_lm

    symbol = (1 - eos_probability) / len(SYMBOLS)
    return markov_lm(np.array([[eos_probability, *[symbol] * len(SYMBOLS)]]), SYMBOLS, order=0)


def stop(best: int, eos_probability: float = EOS_PROBABILITY) -> Task:
    """The task at one best length and one probability of the EOS."""
    limit = 2 * best
    payments = [1 - abs(n - best) / best for n in range(limit + 1)]
    return Task(
        name=f"stop-{best}" if eos_probability == EOS_PROBABILITY else f"stop-{best}-{eos_probability:g}",
        model=functools.partial(reference, eos_probability),
        reward=AutomatonReward(length(limit, payments, len(SYMBOLS) + 1)),
        prompts={"train": SYMBOLS, "test": SYMBOLS},
        kl_coef=0.1,
        max_new_tokens=limit,
    )


for _best in BEST:
    register_task(f"stop-{_best}", functools.partial(stop, _best))
for _eos_probability in OTHER_EOS_PROBABILITIES:
    register_task(f"stop-8-{_eos_probability:g}", functools.partial(stop, 8, _eos_probability))
