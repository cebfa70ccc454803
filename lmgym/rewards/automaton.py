"""Rewards that a deterministic finite automaton pays: a score of the tokens whose optimum dynamic programming can find.

Shapes: S states, C classes of tokens that the automaton does not tell apart, V vocabulary, B responses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmgym.errors import InvalidArgumentError, RewardError, check_choice, check_int, check_number, unknown_name

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
State = TypeVar("State", bound=Hashable)


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
        transitions = _ints("transitions", self.transitions)
        if transitions.ndim != 2 or 0 in transitions.shape:
            raise InvalidArgumentError(
                f"`transitions` must have shape (S, C) with S and C >= 1, got {transitions.shape}."
            )
        states, columns = transitions.shape
        classes = _ints("classes", self.classes)
        if classes.ndim != 1 or not classes.size:
            raise InvalidArgumentError(f"`classes` must have shape (V,) with V >= 1, got {classes.shape}.")
        _check_range("transitions", transitions, states, "states")
        _check_range("classes", classes, columns, "columns of `transitions`")
        check_int("initial", self.initial, 0, states - 1)
        arrays = {"transitions": transitions, "classes": classes, "payments": _floats(self, "payments", (states,))}
        if self.token_payments is not None:
            arrays["token_payments"] = _floats(self, "token_payments", (states, columns))
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
        return _merged(cls(table, payments, tokens, token_payments, initial))  # type: ignore[arg-type]

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


class AutomatonReward:
    """The score of an automaton as a reward function.

    Args:
        automaton: one for all prompts, or what makes the automaton of a prompt from its token ids.
    """

    reads_plain_text = True

    def __init__(self, automaton: Automaton | Callable[[tuple[int, ...]], Automaton]) -> None:
        if not isinstance(automaton, Automaton) and not callable(automaton):
            raise InvalidArgumentError(
                f"`automaton` must be an Automaton or a callable that makes one of prompt ids, got {automaton!r}."
            )
        self._automaton = automaton
        self._made: dict[tuple[int, ...], Automaton] = {}

    def for_prompt(self, prompt_ids: Sequence[int]) -> Automaton:
        """The automaton that scores the responses to a prompt; made once a prompt.

        Raises:
            RewardError: if the callable made something else.
        """
        if isinstance(self._automaton, Automaton):
            return self._automaton
        key = tuple(int(token) for token in prompt_ids)
        if key not in self._made:
            made: object = self._automaton(key)
            if not isinstance(made, Automaton):
                raise RewardError(f"`automaton` must make an Automaton of every prompt, and made {made!r} of {key}.")
            self._made[key] = made
        return self._made[key]

    @property
    def of_all_prompts(self) -> Automaton | None:
        """The automaton, where one scores the responses to all prompts."""
        return self._automaton if isinstance(self._automaton, Automaton) else None

    def score_range(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, float]:
        """What no score of a response to a prompt is below, and above."""
        return self.for_prompt(prompt_ids).score_range(max_new_tokens)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode, of its token ids.

        Args:
            prompts: B texts, not read.
            completions: B texts, not read.
            columns: `completion_ids`, B responses as token ids, the EOS included where there is one; and `prompt_ids`,
                B prompts as token ids, where each prompt has its own automaton.

        Raises:
            RewardError: if a column that is needed is not there, or is not of B rows.
            InvalidArgumentError: if an id is not in the vocabulary of the automaton.
        """
        size = len(completions)
        completion_ids: Sequence[Sequence[int]] | None = columns.get("completion_ids")
        prompt_ids: Sequence[Sequence[int]] | None = columns.get("prompt_ids")
        if completion_ids is None or len(completion_ids) != size:
            came = "none" if completion_ids is None else len(completion_ids)
            raise RewardError(f"An automaton needs {size} `completion_ids`, one a completion, got {came}.")
        if isinstance(self._automaton, Automaton):
            return self._automaton.score(completion_ids).tolist()
        if prompt_ids is None or len(prompt_ids) != size:
            came = "none" if prompt_ids is None else len(prompt_ids)
            raise RewardError(f"An automaton of each prompt needs {size} `prompt_ids`, one a completion, got {came}.")
        scores = np.empty(size)
        batches: dict[int, tuple[Automaton, list[int]]] = {}
        for row, ids in enumerate(prompt_ids):
            automaton = self.for_prompt(ids)
            batches.setdefault(id(automaton), (automaton, []))[1].append(row)
        for automaton, rows in batches.values():
            scores[rows] = automaton.score([completion_ids[row] for row in rows])
        return scores.tolist()


def from_regex(
    pattern: str,
    symbols: Mapping[str, int],
    vocab_size: int,
    eos_token_ids: Sequence[int] = (0,),
    match: float = 1.0,
    fail: float = 0.0,
) -> Automaton:
    r"""Pays `match` for a response that a regular expression over tokens matches as a whole, else `fail`.

    Symbols stand apart by blanks; `.` is any token, `|` or, `*` any number, `+` at least one, `?` at most one, and
    parentheses group: "the ( big | small )* cat .?". A backslash before such a character makes it part of a symbol. A
    token without a symbol can only be matched by `.`. An EOS is no part of what is matched: it leaves the state as it
    is. Thompson's construction, the subset construction, and Moore's minimisation (Hopcroft, Motwani and Ullman 2006,
    chapters 2-4): no automaton with fewer states pays the same.

    Args:
        pattern: the regular expression.
        symbols: token ids by name; none an EOS.
        vocab_size: V.
        eos_token_ids: ids that end a response.
        match: the score of a response that matches.
        fail: the score of one that does not.

    Raises:
        InvalidArgumentError: if the pattern is broken (the message says where), or an id is out of range.
        UnknownNameError: if the pattern has a symbol that is not in `symbols`.
    """
    check_number("match", match, -np.inf)
    check_number("fail", fail, -np.inf)
    _check_ids("eos_token_ids", eos_token_ids, vocab_size)
    _check_ids("symbols", symbols.values(), vocab_size)
    for symbol, token in symbols.items():
        if token in eos_token_ids:
            raise InvalidArgumentError(f"`symbols` must not name an EOS, and {symbol!r} is token {token}.")
    parser = _Parser(pattern, symbols)
    eos = sorted(set(eos_token_ids))
    letters = sorted(parser.used)
    classes = _classes([*eos, *letters], vocab_size)
    letter_of = {len(eos) + i: token for i, token in enumerate(letters)}

    def step(state: frozenset[int], column: int) -> frozenset[int]:
        return state if column < len(eos) else parser.step(state, letter_of.get(column))

    transitions, states = _explore(parser.start, step, classes.max() + 1)
    payments = [match if parser.end in state else fail for state in states]
    return _minimised(Automaton(transitions, np.array(payments, dtype=np.float64), classes))


def counter(tokens: Sequence[int], modulus: int, payments: ArrayLike, vocab_size: int) -> Automaton:
    """Counts the tokens of a set, modulo m.

    State s: so far s of them, mod m. An EOS leaves the state as it is, unless it is one of `tokens`.

    Args:
        tokens: token ids; any of them counts one.
        modulus: m.
        payments: (m,), by the count at the end.
        vocab_size: V.

    Raises:
        InvalidArgumentError: if an id is out of range, or `payments` has another shape.
    """
    check_int("modulus", modulus, 1)
    _check_ids("tokens", tokens, vocab_size)
    classes = np.zeros(vocab_size, dtype=np.int64)
    classes[list(tokens)] = 1
    states = np.arange(modulus)
    transitions = np.stack([states, (states + 1) % modulus], 1)
    return _merged(Automaton(transitions, payments, classes))  # type: ignore[arg-type]


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
    """Pays 1 for a balanced response, nested exactly `depth` deep at its deepest, that ends by an EOS; else 0.

    The Dyck language of bounded depth (Hewitt et al. 2020). A state is which brackets are open and whether `depth` was
    reached (as few states as pay the same). A wrong or a too deep bracket cannot be made good. The EOS does move: to
    the state that pays if the response is complete there, else to the dead state; after it nothing may follow.

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
    brackets = [token for pair in pairs for token in pair]  # opening at even places, its closing one behind it
    _check_ids("pairs", brackets, vocab_size)
    _check_ids("eos_token_ids", eos_token_ids, vocab_size)
    if len({*brackets, *eos_token_ids}) < len(brackets) + len(set(eos_token_ids)):
        raise InvalidArgumentError(f"`pairs` must be of distinct tokens, none an EOS, got {pairs!r}.")
    eos = sorted(set(eos_token_ids))
    classes = _classes([*brackets, *eos], vocab_size)
    dead, paid = "dead", "paid"

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
    transitions, states = _explore(start, step, classes.max() + 1)
    return _minimised(Automaton(transitions, np.array([float(state == paid) for state in states]), classes))


def phrases(phrases: Sequence[Sequence[int]], vocab_size: int, payments: ArrayLike | None = None) -> Automaton:
    """Pays for the number of key phrases that a response contains, each counted once, wherever it stands.

    Aho and Corasick 1975, with the set of phrases seen as part of the state (as few states as pay the same). With all
    seen, nothing moves any more. An EOS is a token like the rest: it ends no phrase that does not have it, and what was
    seen stays seen.

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
    _check_ids("phrases", itertools.chain.from_iterable(wanted), vocab_size)
    by_count = np.arange(len(wanted) + 1) / len(wanted) if payments is None else np.asarray(payments, dtype=np.float64)
    if by_count.shape != (len(wanted) + 1,):
        raise InvalidArgumentError(f"`payments` must have shape {(len(wanted) + 1,)}, got {by_count.shape}.")
    prefixes = {phrase[:i] for phrase in wanted for i in range(len(phrase) + 1)}
    letters = sorted(set(itertools.chain.from_iterable(wanted)))
    classes = _classes(letters, vocab_size)

    def step(state: tuple[tuple[int, ...], frozenset[int]], column: int) -> tuple[tuple[int, ...], frozenset[int]]:
        tail, seen = state
        if column == len(letters):
            return (), seen
        tail = (*tail, letters[column])
        seen |= {i for i, phrase in enumerate(wanted) if tail[-len(phrase) :] == phrase}
        return next(tail[i:] for i in range(len(tail) + 1) if tail[i:] in prefixes), seen

    start: tuple[tuple[int, ...], frozenset[int]] = ((), frozenset())
    transitions, states = _explore(start, step, classes.max() + 1)
    return _minimised(Automaton(transitions, by_count[[len(seen) for _, seen in states]], classes))


def positions(targets: Sequence[int], vocab_size: int) -> Automaton:
    """Pays 1 for every place t with a_t == targets[t], as it is read; nothing from place n on.

    State s: min(tokens read, n). An EOS is a token like the rest: it takes a place, and may be a target.

    Args:
        targets: n token ids.
        vocab_size: V.

    Raises:
        InvalidArgumentError: if an id is out of range.
    """
    _check_ids("targets", targets, vocab_size)
    n = len(targets)
    letters = sorted(set(targets))
    classes = _classes(letters, vocab_size)
    columns = int(classes.max()) + 1
    transitions = np.repeat(np.minimum(np.arange(1, n + 2), n)[:, None], columns, 1)
    payments = np.zeros((n + 1, columns))
    payments[np.arange(n), [letters.index(token) for token in targets]] = 1.0
    return Automaton(transitions, np.zeros(n + 1), classes, payments)


class _Parser:
    """A regular expression as a nondeterministic automaton (Thompson 1968).

    Attributes:
        start: the states before the first letter. end: the state that accepts. used: token ids of its symbols.
    """

    def __init__(self, pattern: str, symbols: Mapping[str, int]) -> None:
        self._pattern, self._symbols = pattern, symbols
        self._lexemes = [(m[0], m.start()) for m in re.finditer(r"[|*+?().]|(?:\\.|[^\s|*+?().\\])+|\\", pattern)]
        self._next = 0
        self._empty: list[list[int]] = []  # by state, the states reached without a letter
        self._read: list[tuple[int | None, int] | None] = []  # by state, the letter (None: any) and the state behind it
        self.used: set[int] = set()
        first, self.end = self._alternatives()
        if self._next < len(self._lexemes):
            raise self._error("a parenthesis closes that none opened")
        self.start = self._closure([first])

    def step(self, states: frozenset[int], token: int | None) -> frozenset[int]:
        """The states after one more token; None is a token that no symbol names."""
        arrows = [self._read[state] for state in states]
        return self._closure([arrow[1] for arrow in arrows if arrow is not None and arrow[0] in (None, token)])

    def _closure(self, states: list[int]) -> frozenset[int]:
        found = set(states)
        while states:
            new = set(self._empty[states.pop()]) - found
            found |= new
            states.extend(new)
        return frozenset(found)

    def _state(self) -> int:
        self._empty.append([])
        self._read.append(None)
        return len(self._empty) - 1

    def _peek(self) -> str:
        return self._lexemes[self._next][0] if self._next < len(self._lexemes) else ""

    def _error(self, what: str) -> InvalidArgumentError:
        place = self._lexemes[self._next][1] if self._next < len(self._lexemes) else len(self._pattern)
        return InvalidArgumentError(
            f"`pattern` must be a regular expression over symbols, got {self._pattern!r}: at character {place}, {what}."
        )

    def _alternatives(self) -> tuple[int, int]:
        start, end = self._state(), self._state()
        while True:
            first, last = self._sequence()
            self._empty[start].append(first)
            self._empty[last].append(end)
            if self._peek() != "|":
                return start, end
            self._next += 1

    def _sequence(self) -> tuple[int, int]:
        start = end = self._state()
        while self._peek() not in ("", "|", ")"):
            first, last = self._repeated()
            self._empty[end].append(first)
            end = last
        return start, end

    def _repeated(self) -> tuple[int, int]:
        start, end = self._atom()
        sign = self._peek()
        if sign not in ("*", "+", "?"):
            return start, end
        self._next += 1
        if self._peek() in ("*", "+", "?"):
            raise self._error(f"{self._peek()!r} follows {sign!r}; put what it repeats in parentheses")
        first, last = self._state(), self._state()
        self._empty[first].append(start)
        self._empty[end].append(last)
        if sign != "?":
            self._empty[end].append(start)
        if sign != "+":
            self._empty[first].append(last)
        return first, last

    def _atom(self) -> tuple[int, int]:
        lexeme = self._peek()
        if lexeme in ("*", "+", "?"):
            raise self._error(f"{lexeme!r} has nothing to repeat")
        if lexeme == "\\":
            raise self._error("a backslash has nothing behind it")
        if lexeme == "(":
            opened = self._next
            self._next += 1
            inside = self._alternatives()
            if self._peek() != ")":
                self._next = opened
                raise self._error("a parenthesis opens that none closes")
            self._next += 1
            return inside
        letter = None
        if lexeme != ".":
            name = re.sub(r"\\(.)", r"\1", lexeme)
            if name not in self._symbols:
                raise unknown_name(f"pattern[{self._lexemes[self._next][1]}]", name, self._symbols)
            letter = self._symbols[name]
            self.used.add(letter)
        self._next += 1
        start, end = self._state(), self._state()
        self._read[start] = (letter, end)
        return start, end


def _ints(argument: str, values: object) -> Ints:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise InvalidArgumentError(f"`{argument}` must be an array of ints, got dtype {array.dtype}.")
    return array.astype(np.int64)


def _floats(automaton: Automaton, argument: str, shape: tuple[int, ...]) -> Any:
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


def _merged(automaton: Automaton) -> Automaton:
    """The same automaton with equal columns merged into one class, in the order of their first column."""
    tables = [automaton.transitions] + ([] if automaton.token_payments is None else [automaton.token_payments])
    columns = zip(*(np.ascontiguousarray(table.T) for table in tables), strict=True)
    keys: dict[bytes, int] = {}
    merged = np.array([keys.setdefault(b"".join(part.tobytes() for part in parts), len(keys)) for parts in columns])
    kept = np.unique(merged, return_index=True)[1]
    return Automaton(
        automaton.transitions[:, kept],
        automaton.payments,
        merged[automaton.classes],
        None if automaton.token_payments is None else automaton.token_payments[:, kept],
        automaton.initial,
    )


def _check_ids(argument: str, ids: Iterable[int], vocab_size: int) -> None:
    check_int("vocab_size", vocab_size, 1)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidArgumentError(f"`{argument}` must be token ids from 0 to {vocab_size - 1}, got {token!r}.")


def _classes(tokens: Sequence[int], vocab_size: int) -> Ints:
    """(V,): the place of a token in `tokens`, which are distinct; `len(tokens)` for all others, if there are any."""
    classes = np.full(vocab_size, len(tokens), dtype=np.int64)
    classes[list(tokens)] = np.arange(len(tokens))
    return classes


def _explore(start: State, step: Callable[[State, int], State], columns: int) -> tuple[Ints, list[State]]:
    """The (S, C) table of all states that can be reached, and the states; the start is the first."""
    numbers, states, rows = {start: 0}, [start], []
    for state in states:  # grows as states are found
        after = [step(state, column) for column in range(columns)]
        for new in after:
            if new not in numbers:
                numbers[new] = len(states)
                states.append(new)
        rows.append([numbers[new] for new in after])
    return np.array(rows, dtype=np.int64), states


def _minimised(automaton: Automaton) -> Automaton:
    """The smallest automaton that pays the same, of one whose states can all be reached and that pays at the end alone.

    Moore's algorithm: states part as long as some token leads them to states that have parted.
    """
    parts = np.unique(automaton.payments, return_inverse=True)[1].reshape(-1)
    while True:
        signatures = np.column_stack([parts, parts[automaton.transitions]])
        finer = np.unique(signatures, axis=0, return_inverse=True)[1].reshape(-1)
        if finer.max() == parts.max():
            break
        parts = finer
    first = np.unique(parts, return_index=True)[1]
    order = np.argsort(first)  # states keep the order in which they were found, so the initial one is the first
    number = np.argsort(order)
    kept = first[order]
    return _merged(Automaton(number[parts[automaton.transitions[kept]]], automaton.payments[kept], automaton.classes))
