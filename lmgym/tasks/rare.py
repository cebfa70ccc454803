"""Can the agent find a reward that the reference hits once in 10^2 to 10^5 episodes? "a b" within 8 tokens pays 1.

The horizon is fixed, and the knob is how rare the payment is: in `rare-3` it is one episode in 10^3. The reference is
that of `keyword` with another pi_ref(b | a).
"""

from __future__ import annotations

import functools

from lmgym.automata import phrases
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks.base import Task
from lmgym.tasks.keywords import SYMBOLS, VOCABULARY, reference
from lmgym.tasks.registry import register_task

KEYED = {2: 0.024279, 3: 0.0024187, 4: 0.00024177, 5: 2.4177e-05}  # -log10 of the success: pi_ref(b | a)


def rare(magnitude: int) -> Task:
    """The task at a success of 10 ** -magnitude."""
    starts = SYMBOLS[2:]
    return Task(
        name=f"rare-{magnitude}",
        model=functools.partial(reference, KEYED[magnitude]),
        reward=AutomatonReward(phrases([[1, 2]], VOCABULARY)),
        prompts={"train": starts, "test": starts},
        kl_coef=0.05,
        max_new_tokens=8,
    )


for _magnitude in KEYED:
    register_task(f"rare-{_magnitude}", functools.partial(rare, _magnitude))
