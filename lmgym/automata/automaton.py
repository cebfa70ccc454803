"""Deterministic finite automata that read the tokens of a response and pay for them.

Shapes: S states, C classes of tokens that the automaton does not tell apart, V vocabulary, B responses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmgym.errors import InvalidArgumentError, check_int

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton that reads every token of a response, the EOS included, and pays for it.

    score(y) = sum_t token_payments[s_t, classes[a_t]] + payments[s_n], with s_0 = initial and
    s_{t+1} = transitions[s_t, classes[a_t]].

    Attributes:
        transitions: (S, C) int64, the next state by state and class.
        payments: (S,) float64, paid by the state in which reading ended.
        classes: (V,) int64, the class of each token.
        token_payments: (S, C) float64, paid for a token of this class read in this state; None pays nothing.
        initial: the state that reading starts in.

    Raises:
        InvalidArgumentError: if a shape does not fit, a state or class is out of range, or a payment is not finite.
    """

    transitions: Ints
    payments: Floats
    classes: Ints
    token_payments: Floats | None = None
    initial: int = 0

    def __post_init__(self) -> None:
        transitions = _as_ints("transitions", self.transitions)
        if transitions.ndim != 2 or 0 in transitions.shape:
            raise InvalidArgumentError(
                f"`transitions` must have shape (S, C) with S and C >= 1, got {transitions.shape}."
            )
        states, columns = transitions.shape
        classes = _as_ints("classes", self.classes)
        if classes.ndim != 1 or not classes.size:
            raise InvalidArgumentError(f"`classes` must have shape (V,) with V >= 1, got {classes.shape}.")
        _check_range("transitions", transitions, states, "states")
        _check_range("classes", classes, columns, "columns of `transitions`")
        check_int("initial", self.initial, 0, states - 1)
        arrays = {"transitions": transitions, "classes": classes, "payments": _as_floats(self, "payments", (states,))}
        if self.token_payments is not None:
            arrays["token_payments"] = _as_floats(self, "token_payments", (states, columns))
        for name, array in arrays.items():
            object.__setattr__(self, name, array)

    @classmethod
    def dense(
        cls, transitions: ArrayLike, payments: ArrayLike, token_payments: ArrayLike | None = None, initial: int = 0
    ) -> Automaton:
        """An automaton from tables with a column for each token: equal columns become one class.

        Args:
            transitions: (S, V) ints.
            payments: (S,).
            token_payments: (S, V), or None.
            initial: the state that reading starts in.
        """
        table: Any = np.asarray(transitions)
        tokens = np.arange(table.shape[1] if table.ndim == 2 else 0)
        return merge_columns(cls(table, payments, tokens, token_payments, initial))  # type: ignore[arg-type]

    def read(self, ids: Sequence[Sequence[int]]) -> tuple[Ints, Floats]:
        """Reads responses, the EOS included.

        Args:
            ids: B responses as token ids; an empty one stays in the initial state.

        Returns:
            (B,) int64 states in which reading ended, and (B,) float64 token payments collected on the way.

        Raises:
            InvalidArgumentError: if an id is not in the vocabulary.
        """
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int64, lengths.sum())
        outside = (tokens < 0) | (tokens >= len(self.classes))
        if outside.any():
            raise InvalidArgumentError(
                f"`ids` must be token ids from 0 to {len(self.classes) - 1}, the vocabulary of the automaton, "
                f"got {tokens[outside.argmax()]}."
            )
        read = self.classes[tokens]
        starts = lengths.cumsum() - lengths
        order = np.argsort(-lengths, kind="stable")
        states = np.full(len(lengths), self.initial, dtype=np.int64)
        collected = np.zeros(len(lengths))
        for t in range(lengths.max(initial=0)):
            rows = order[: np.count_nonzero(lengths > t)]  # the longest first, so these are the ones still reading
            columns = read[starts[rows] + t]
            if self.token_payments is not None:
                collected[rows] += self.token_payments[states[rows], columns]
            states[rows] = self.transitions[states[rows], columns]
        return states, collected

    def score(self, ids: Sequence[Sequence[int]]) -> Floats:
        """(B,) float64 scores of B responses, the EOS included. Raises as `read` does."""
        states, collected = self.read(ids)
        return collected + self.payments[states]

    def equals(self, other: Automaton) -> bool:
        """Whether another automaton is the same, state by state."""
        return all(np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    def score_range(self, max_new_tokens: int) -> tuple[float, float]:
        """The least and the largest score of up to so many tokens, whichever they are."""
        paid = np.zeros(self.transitions.shape) if self.token_payments is None else self.token_payments
        low = self.payments
        high = self.payments
        for _ in range(max_new_tokens):
            low = np.minimum(self.payments, (paid + low[self.transitions]).min(1))
            high = np.maximum(self.payments, (paid + high[self.transitions]).max(1))
        return float(low[self.initial]), float(high[self.initial])


def merge_columns(automaton: Automaton) -> Automaton:
    """The same automaton with equal columns merged into one class, in the order of their first column."""
    paid = automaton.token_payments
    tables = [automaton.transitions] if paid is None else [automaton.transitions, paid]
    columns = zip(*(np.ascontiguousarray(table.T) for table in tables), strict=True)
    keys: dict[bytes, int] = {}
    merged = np.array([keys.setdefault(b"".join(part.tobytes() for part in parts), len(keys)) for parts in columns])
    first = np.unique(merged, return_index=True)[1]
    return Automaton(
        automaton.transitions[:, first],
        automaton.payments,
        merged[automaton.classes],
        None if paid is None else paid[:, first],
        automaton.initial,
    )


def check_token_ids(argument: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises `InvalidArgumentError` unless `argument` holds token ids of a vocabulary of V."""
    check_int("vocab_size", vocab_size, 1)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidArgumentError(f"`{argument}` must be token ids from 0 to {vocab_size - 1}, got {token!r}.")


def classify_tokens(tokens: Sequence[int], vocab_size: int) -> Ints:
    """(V,) the class of each token: its index in `tokens`, which are distinct; `len(tokens)` for all others."""
    classes = np.full(vocab_size, len(tokens), dtype=np.int64)
    classes[list(tokens)] = np.arange(len(tokens))
    return classes


def _as_ints(argument: str, values: object) -> Ints:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise InvalidArgumentError(f"`{argument}` must be an array of ints, got dtype {array.dtype}.")
    return array.astype(np.int64)


def _as_floats(automaton: Automaton, argument: str, shape: tuple[int, ...]) -> Any:
    array = np.asarray(getattr(automaton, argument), dtype=np.float64).copy()
    if array.shape != shape:
        raise InvalidArgumentError(f"`{argument}` must have shape {shape}, as `transitions` has it, got {array.shape}.")
    if not np.isfinite(array).all():
        raise InvalidArgumentError(f"`{argument}` must be finite, got {array[~np.isfinite(array)][0]}.")
    return array


def _check_range(argument: str, array: Ints, size: int, what: str) -> None:
    outside = (array < 0) | (array >= size)
    if outside.any():
        raise InvalidArgumentError(
            f"`{argument}` must be from 0 to {size - 1}, the {size} {what}, got {array[outside][0]}."
        )
