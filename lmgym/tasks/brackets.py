"""Can the agent respect long-range structure? A balanced word of two kinds of brackets pays 1.

The response must close what it opens, in order. It must reach exactly the depth that is asked for, and end with an EOS.
The reference sees one token back. So it knows which bracket may follow which, and not what is still open. The knob is
the depth.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lmgym.automata import bounded_stack
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, register_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

DEPTHS = (1, 2, 3, 4)
SYMBOLS = ["(", ")", "[", "]", ":"]
# pi_ref of the EOS, "(", ")", "[", "]", ":" after an opening bracket, with the place of the bracket that closes it
# swapped in for ")", and after anything else.
_OPENED = [0.04, 0.25, 0.40, 0.25, 0.05, 0.01]
_CLOSED = [0.25, 0.17, 0.20, 0.17, 0.20, 0.01]
_START = [0.01, 0.47, 0.02, 0.47, 0.02, 0.01]


@functools.cache
def reference() -> CausalLM:
    """A table of order 1."""
    from lmgym.models.tables import markov_lm

    square = [_OPENED[i] for i in (0, 1, 4, 3, 2, 5)]
    rows = np.array([_START, _OPENED, _CLOSED, square, _CLOSED, _START])
    return markov_lm(rows, SYMBOLS)


def brackets(depth: int) -> Task:
    """The task at one depth."""
    return Task(
        name=f"brackets-{depth}",
        model=reference,
        reward=AutomatonReward(bounded_stack([(1, 2), (3, 4)], depth, len(SYMBOLS) + 1, (0,))),
        prompts={"train": [":"], "test": [":"]},
        kl_coef=0.1,
        max_new_tokens=2 * depth + 4,
    )


for _depth in DEPTHS:
    register_task(f"brackets-{_depth}", functools.partial(brackets, _depth))
