"""Automata of common rewards: for the length, brackets, phrases and positions of a response.

Shapes: K phrases, n targets, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lmgym.automata.automaton import Automaton, check_token_ids, classify_tokens
from lmgym.automata.minimise import build_smallest
from lmgym.errors import InvalidArgumentError, check_choice, check_int


def length(limit: int, payments: ArrayLike, vocab_size: int) -> Automaton:
    """Counts the tokens of a response, up to a limit.

    State s: min(tokens read, limit). An EOS is a token like the rest and counts.

    Args:
        limit: where counting stops.
        payments: (limit + 1,), by the number of tokens.
        vocab_size: V.

    Raises:
        InvalidArgumentError: if `payments` has another shape.
    """
    check_int("limit", limit, 0)
    check_int("vocab_size", vocab_size, 1)
    transitions = np.minimum(np.arange(1, limit + 2), limit)[:, None]
    return Automaton(transitions, payments, np.zeros(vocab_size, dtype=np.int64))  # type: ignore[arg-type]


def bounded_stack(
    pairs: Sequence[tuple[int, int]],
    depth: int,
    vocab_size: int,
    eos_token_ids: Sequence[int] = (0,),
    *,
    others: str = "reject",
) -> Automaton:
    """Pays 1 for a balanced response that ends by an EOS and whose deepest nesting is exactly `depth`; else 0.

    The Dyck language of bounded depth (Hewitt et al. 2020). A state says which brackets are open and whether `depth`
    was reached (the smallest such automaton). Nothing makes up for a wrong bracket, or one too deep. An EOS leads to
    the state that pays if the response is complete there, else to the dead state; any token after it leads there too.

    Args:
        pairs: (opening, closing) token ids of each kind of bracket.
        depth: brackets open at once.
        vocab_size: V.
        eos_token_ids: ids that end a response.
        others: what a token that is no bracket does: "ignore" (nothing) or "reject" (never paid then).

    Raises:
        InvalidArgumentError: if an id is out of range or stands for two things.
        UnknownNameError: if `others` is something else.
    """
    check_int("depth", depth, 1)
    check_choice("others", others, ["ignore", "reject"])
    brackets = [token for pair in pairs for token in pair]  # an opening one at each even index, its closing one next
    check_token_ids("pairs", brackets, vocab_size)
    check_token_ids("eos_token_ids", eos_token_ids, vocab_size)
    if len({*brackets, *eos_token_ids}) < len(brackets) + len(set(eos_token_ids)):
        raise InvalidArgumentError(f"`pairs` must be of distinct tokens, none an EOS, got {pairs!r}.")
    eos = sorted(set(eos_token_ids))
    classes = classify_tokens([*brackets, *eos], vocab_size)
    dead = "dead"
    paid = "paid"

    def step(state: str | tuple[tuple[int, ...], bool], column: int) -> str | tuple[tuple[int, ...], bool]:
        if isinstance(state, str):
            return dead
        stack, reached = state
        if column >= len(brackets) + len(eos):
            return state if others == "ignore" else dead
        if column >= len(brackets):
            return paid if reached and not stack else dead
        if column % 2 == 0:
            return ((*stack, column), reached or len(stack) + 1 == depth) if len(stack) < depth else dead
        return (stack[:-1], reached) if stack[-1:] == (column - 1,) else dead

    start: str | tuple[tuple[int, ...], bool] = ((), False)
    return build_smallest(start, step, lambda state: float(state == paid), classes)


def phrases(phrases: Sequence[Sequence[int]], vocab_size: int, payments: ArrayLike | None = None) -> Automaton:
    """Pays for the number of key phrases that a response contains anywhere, each counted once.

    Aho and Corasick 1975, with the set of phrases seen as part of the state (the smallest such automaton). Once all are
    seen, the state stays. An EOS is a token like the rest: it is part of a phrase only where the phrase lists it.

    Args:
        phrases: K phrases as token ids; they may overlap or contain each other.
        vocab_size: V.
        payments: (K + 1,), by the number of phrases seen; None is the share of the phrases, 0 to 1.

    Raises:
        InvalidArgumentError: if there is no phrase, one is empty or has an id out of range, or `payments` has another
            shape.
    """
    wanted = [tuple(phrase) for phrase in phrases]
    if not wanted or () in wanted:
        raise InvalidArgumentError(f"`phrases` must be one or more phrases of one or more tokens, got {phrases!r}.")
    check_token_ids("phrases", itertools.chain.from_iterable(wanted), vocab_size)
    by_count = np.arange(len(wanted) + 1) / len(wanted) if payments is None else np.asarray(payments, dtype=np.float64)
    if by_count.shape != (len(wanted) + 1,):
        raise InvalidArgumentError(f"`payments` must have shape {(len(wanted) + 1,)}, got {by_count.shape}.")
    prefixes = {phrase[:i] for phrase in wanted for i in range(len(phrase) + 1)}
    letters = sorted(set(itertools.chain.from_iterable(wanted)))
    classes = classify_tokens(letters, vocab_size)

    def step(state: tuple[tuple[int, ...], frozenset[int]], column: int) -> tuple[tuple[int, ...], frozenset[int]]:
        tail, seen = state
        if column == len(letters):
            return (), seen
        tail = (*tail, letters[column])
        seen |= {i for i, phrase in enumerate(wanted) if tail[-len(phrase) :] == phrase}
        return next(tail[i:] for i in range(len(tail) + 1) if tail[i:] in prefixes), seen

    start: tuple[tuple[int, ...], frozenset[int]] = ((), frozenset())
    return build_smallest(start, step, lambda state: float(by_count[len(state[1])]), classes)


def positions(targets: Sequence[int], vocab_size: int) -> Automaton:
    """Pays 1 for every position t with a_t == targets[t], as it is read; nothing from position n on.

    State s: min(tokens read, n). An EOS is a token like the rest: it has a position, and may be a target.

    Args:
        targets: n token ids.
        vocab_size: V.

    Raises:
        InvalidArgumentError: if an id is out of range.
    """
    check_token_ids("targets", targets, vocab_size)
    n = len(targets)
    letters = sorted(set(targets))
    classes = classify_tokens(letters, vocab_size)
    columns = int(classes.max()) + 1
    transitions = np.repeat(np.minimum(np.arange(1, n + 2), n)[:, None], columns, 1)
    payments = np.zeros((n + 1, columns))
    payments[np.arange(n), [letters.index(token) for token in targets]] = 1.0
    return Automaton(transitions, np.zeros(n + 1), classes, payments)
