"""Can the agent cope with a large action space? Each of the 4 tokens that is in a secret tenth of the symbols pays 1.

The good symbols are drawn at random, so one says nothing about another. The reference gives the good ones a tenth of
its probability at every step, however many they are: only the number of actions varies. It is a table of order 1 whose
rows are mixtures of 8 distributions.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from lmgym.automata import Automaton
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, register_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

SIZES = (8, 64, 512, 4096, 50_000)  # V, the EOS included
RANK = 8
GOOD_MASS = 0.1


@functools.cache
def good(size: int) -> np.ndarray:
    """(V,) bool, the symbols that pay."""
    chosen = np.random.default_rng(size).permutation(size - 1)[: max(1, round((size - 1) * 0.1))] + 1
    mask = np.zeros(size, dtype=np.bool_)
    mask[chosen] = True
    return mask


@functools.cache
def reference(size: int) -> CausalLM:
    """A table of order 1 and rank 8 over `size` tokens."""
    from lmgym.models.tables import dirichlet_rows, markov_lm

    rng = np.random.default_rng(3)
    rows = dirichlet_rows(rng, RANK, size, 1.0)
    pays = good(size)
    rest = ~pays
    rest[0] = False
    rows[:, pays] *= GOOD_MASS / rows[:, pays].sum(1, keepdims=True)
    rows[:, rest] *= (1 - GOOD_MASS - 1e-3) / rows[:, rest].sum(1, keepdims=True)
    rows[:, 0] = 1e-3
    return markov_lm(rows, symbols(size), mixture=dirichlet_rows(rng, size, RANK, 0.3))


@functools.cache
def symbols(size: int) -> list[str]:
    """The V - 1 symbols."""
    return [f"w{i}" for i in range(1, size)]


def vocabulary(size: int) -> Task:
    """The task at one number of actions."""
    pays = Automaton.dense(np.zeros((1, size), dtype=np.int64), np.zeros(1), good(size)[None].astype(np.float64))
    starts = symbols(size)[:8]
    return Task(
        name=f"vocabulary-{size}",
        model=functools.partial(reference, size),
        reward=AutomatonReward(pays),
        prompts={"train": starts, "test": starts},
        kl_coef=0.2,
        max_new_tokens=4,
    )


for _size in SIZES:
    register_task(f"vocabulary-{_size}", functools.partial(vocabulary, _size))
