"""Can the agent learn at all? It should copy the prompt, and every token that is copied to its position pays 1.

The reference is a random table of transitions over 8 symbols, and knows nothing of copying. Each position is a small
bandit of its own, given the prompt. The knob is the length of the prompt, and so of the response.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmgym.automata import Automaton, positions
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, register_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

LENGTHS = (2, 4, 8, 16)
SYMBOLS = ["a", "b", "c", "d", "e", "f", "g", "h"]
VOCABULARY = len(SYMBOLS) + 1


@functools.cache
def reference() -> CausalLM:
    """A table of order 1."""
    from lmgym.models.tables import dirichlet_rows, markov_lm

    rows = dirichlet_rows(np.random.default_rng(1), VOCABULARY, VOCABULARY, 2.0)
    rows[:, 0] = 0.0
    rows = 0.99 * rows / rows.sum(1, keepdims=True)
    rows[:, 0] = 0.01
    return markov_lm(rows, SYMBOLS)


def prompts(length: int) -> dict[str, list[str]]:
    """Distinct prompts: 256 to train on and 64 to test on, of 48 and 16 where there are only 64."""
    rng = np.random.default_rng(length)
    total = min(320, len(SYMBOLS) ** length)
    distinct: dict[str, None] = {}
    while len(distinct) < total:
        distinct[" ".join(rng.choice(SYMBOLS, length))] = None
    texts = list(distinct)
    test = total // 5 if total == 320 else total // 4
    return {"train": texts[test:], "test": texts[:test]}


def copying(prompt_ids: Sequence[int]) -> Automaton:
    """Pays 1 for every position that holds the prompt's token."""
    return positions(prompt_ids, VOCABULARY)


def echo(length: int) -> Task:
    """The task at one length."""
    return Task(
        name=f"echo-{length}",
        model=reference,
        reward=AutomatonReward(copying),
        prompts=prompts(length),
        kl_coef=0.1,
        max_new_tokens=length,
    )


for _length in LENGTHS:
    register_task(f"echo-{_length}", functools.partial(echo, _length))
