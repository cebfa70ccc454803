"""What the tests of automata share: strings to read, the definition one token at a time, and automata to read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmgym.automata import Automaton

EOS = 0
GOOD: dict[str, Any] = {
    "transitions": [[0, 1], [1, 0]], "payments": [0.0, 1.0], "classes": [0, 1, 1], "token_payments": [[0, 0], [0, 1]],
}  # fmt: skip


def strings(size: int, longest: int) -> list[tuple[int, ...]]:
    """All sequences of up to `longest` tokens below `size`, the empty one too."""
    return [y for n in range(longest + 1) for y in itertools.product(range(size), repeat=n)]


def by_hand(automaton: Automaton, ids: Sequence[int]) -> float:
    """The definition, one token at a time."""
    state = automaton.initial
    total = 0.0
    for token in ids:
        column = automaton.classes[token]
        if automaton.token_payments is not None:
            total += automaton.token_payments[state, column]
        state = automaton.transitions[state, column]
    return float(total + automaton.payments[state])


def random_automaton(seed: int, *, states: int = 4, columns: int = 3, size: int = 5) -> Automaton:
    rng = np.random.default_rng(seed)
    return Automaton(
        rng.integers(0, states, (states, columns)),
        rng.normal(size=states),
        rng.integers(0, columns, size),
        rng.normal(size=(states, columns)),
        initial=int(rng.integers(states)),
    )


def count_distinct_states(automaton: Automaton) -> int:
    """Reachable states that some continuation tells apart: the fewest that an automaton can do with."""
    reached = {automaton.initial}
    front = [automaton.initial]
    while front:
        new = set(automaton.transitions[front].ravel().tolist()) - reached
        reached |= new
        front = list(new)
    futures = {
        state: tuple(
            by_hand(Automaton(automaton.transitions, automaton.payments, automaton.classes, None, state), y)
            for y in strings(len(automaton.classes), 4)
        )
        for state in reached
    }
    return len(set(futures.values()))


def count_tokens(tokens: Sequence[int], payments: Sequence[float], vocab_size: int) -> Automaton:
    """Pays by how many of the tokens of a set a response has, modulo the number of payments."""
    states = np.arange(len(payments))
    classes = np.isin(np.arange(vocab_size), tokens).astype(np.int64)
    transitions = np.stack([states, (states + 1) % len(payments)], 1)
    return Automaton(transitions, np.array(payments, dtype=np.float64), classes)
