"""Can the agent trade score against KL at the right rate? Every symbol has a value, and a response pays their sum / 8.

8 is the length limit. A response that ends early loses what was still to come, positive or negative. The score is
smooth and dense: the agent has nothing to find, only a price to pay. The reference is a random table of order 1 over 16
symbols. The knob is the price, `kl_coef`. At 0.01 the best policy almost ignores the reference, at 1 it almost equals
it.
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

KL_COEFS = (0.01, 0.03, 0.1, 0.3, 1.0)
SYMBOLS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]
VOCABULARY = len(SYMBOLS) + 1
HORIZON = 8


@functools.cache
def reference() -> CausalLM:
    """A table of order 1."""
    from lmgym.models.tables import dirichlet_rows, markov_lm

    rows = dirichlet_rows(np.random.default_rng(4), VOCABULARY, VOCABULARY, 1.0)
    rows[:, 0] = 0.0
    rows = (1 - 1e-3) * rows / rows.sum(1, keepdims=True)
    rows[:, 0] = 1e-3
    return markov_lm(rows, SYMBOLS)


@functools.cache
def scaled_sum() -> AutomatonReward:
    """Pays the sum of the symbols' values / 8, whatever the length; they are spread evenly over [-1, 1], shuffled."""
    values = np.zeros((1, VOCABULARY))
    values[0, 1:] = np.random.default_rng(5).permutation(np.linspace(-1, 1, len(SYMBOLS))) / HORIZON
    return AutomatonReward(Automaton.dense(np.zeros((1, VOCABULARY), dtype=np.int64), np.zeros(1), values))


def anchor(kl_coef: float) -> Task:
    """The task at one price."""
    return Task(
        name=f"anchor-{kl_coef:g}",
        model=reference,
        reward=scaled_sum(),
        prompts={"train": SYMBOLS, "test": SYMBOLS},
        kl_coef=kl_coef,
        max_new_tokens=HORIZON,
    )


for _kl_coef in KL_COEFS:
    register_task(f"anchor-{_kl_coef:g}", functools.partial(anchor, _kl_coef))
