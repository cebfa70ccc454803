"""Does the agent get gamma right? A response of n tokens pays 1 - exp(-n / 8).

At gamma = 1 the best is to write up to the limit of 32 tokens. The smaller gamma is, the earlier it is best to end. An
agent that learns with another gamma than the task's ends at the wrong time. The reference ends with probability 0.1 at
every step. The knob is gamma.
"""

from __future__ import annotations

import functools
import math

from lmgym.automata import length
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, register_task
from lmgym.tasks.stop import SYMBOLS, reference

GAMMAS = (1.0, 0.99, 0.95, 0.9)
HORIZON = 32


def discount(gamma: float) -> Task:
    """The task at one discount."""
    payments = [1 - math.exp(-n / 8) for n in range(HORIZON + 1)]
    return Task(
        name=f"discount-{gamma:g}",
        model=reference,
        reward=AutomatonReward(length(HORIZON, payments, len(SYMBOLS) + 1)),
        prompts={"train": SYMBOLS, "test": SYMBOLS},
        kl_coef=0.05,
        gamma=gamma,
        max_new_tokens=HORIZON,
    )


for _gamma in GAMMAS:
    register_task(f"discount-{_gamma:g}", functools.partial(discount, _gamma))
