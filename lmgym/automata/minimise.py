"""From a step function over states of any kind to the smallest automaton that pays the same.

Shapes: S states, C classes of tokens that the automaton does not tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np

from lmgym.automata.automaton import Automaton, Ints, merge_columns

State = TypeVar("State", bound=Hashable)


def build_smallest(
    start: State, step: Callable[[State, int], State], pay: Callable[[State], float], classes: Ints
) -> Automaton:
    """The smallest automaton that pays at the end what a step function says.

    Args:
        start: the state before the first token.
        step: gives the state after a token, from the state before it and the token's class. From `start` it must reach
            a finite number of states.
        pay: gives the payment for a response that ends in a state.
        classes: (V,) the class of each token.
    """
    transitions, states = explore(start, step, classes.max() + 1)
    payments = np.array([pay(state) for state in states], dtype=np.float64)
    return minimise(Automaton(transitions, payments, classes))


def explore(start: State, step: Callable[[State, int], State], columns: int) -> tuple[Ints, list[State]]:
    """The (S, C) table of all states that `start` leads to, and these states; the first is `start`."""
    numbers = {start: 0}
    states = [start]
    rows = []
    for state in states:  # the list grows while new states are found
        reached = [step(state, column) for column in range(columns)]
        for new in reached:
            if new not in numbers:
                numbers[new] = len(states)
                states.append(new)
        rows.append([numbers[new] for new in reached])
    return np.array(rows, dtype=np.int64), states


def minimise(automaton: Automaton) -> Automaton:
    """The smallest automaton that pays the same.

    Moore's algorithm: it splits a set of states as long as some token leads two of them to sets that differ.

    Args:
        automaton: one that reaches all of its states, and pays at the end alone.
    """
    parts = np.unique(automaton.payments, return_inverse=True)[1].reshape(-1)
    while True:
        signatures = np.column_stack([parts, parts[automaton.transitions]])
        finer = np.unique(signatures, axis=0, return_inverse=True)[1].reshape(-1)
        if finer.max() == parts.max():
            break
        parts = finer
    first = np.unique(parts, return_index=True)[1]
    order = np.argsort(first)  # the parts in the order of their first states, so that the initial one stays first
    number = np.argsort(order)
    chosen = first[order]
    transitions = number[parts[automaton.transitions[chosen]]]
    return merge_columns(Automaton(transitions, automaton.payments[chosen], automaton.classes))
