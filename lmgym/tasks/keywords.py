"""Can the agent assign credit from one payment at the end? A response that contains "a b" pays 1.

The knob is the horizon. The reference is a table of order 1 over 16 symbols. It would find the phrase more often if it
wrote longer. So pi_ref(b | a) is set such that it finds the phrase in 2 % of its episodes at every horizon. All else is
the same: only the distance between an action and its payment varies.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lmgym.automata import phrases
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, register_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

SYMBOLS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]
VOCABULARY = len(SYMBOLS) + 1
SUCCESS = 0.02
# Horizon: the pi_ref(b | a) at which the success is 0.02.
KEYED = {8: 0.048764, 16: 0.022631, 32: 0.010931, 64: 0.00538, 128: 0.002676}


@functools.cache
def reference(keyed: float) -> CausalLM:
    """A table of order 1 with pi_ref(b | a) = `keyed`."""
    from lmgym.models.tables import dirichlet_rows, markov_lm

    rows = dirichlet_rows(np.random.default_rng(2), VOCABULARY, VOCABULARY, 4.0)
    rows[:, 0] = 0.0
    rows[1, 2] = 0.0
    rows = (1 - 1e-4) * rows / rows.sum(1, keepdims=True)
    rows[:, 0] = 1e-4
    rows[1] *= 1 - keyed
    rows[1, 2] = keyed
    return markov_lm(rows, SYMBOLS)


def keyword(horizon: int) -> Task:
    """The task at one horizon."""
    starts = SYMBOLS[2:]
    return Task(
        name=f"keyword-{horizon}",
        model=functools.partial(reference, KEYED[horizon]),
        reward=AutomatonReward(phrases([[1, 2]], VOCABULARY)),
        prompts={"train": starts, "test": starts},
        kl_coef=0.1,
        max_new_tokens=horizon,
    )


for _horizon in KEYED:
    register_task(f"keyword-{_horizon}", functools.partial(keyword, _horizon))
