"""Regular expressions over tokens as automata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from lmgym.automata.automaton import Automaton, check_token_ids, classify_tokens
from lmgym.automata.minimise import build_smallest
from lmgym.errors import InvalidArgumentError, check_number, unknown_name


def from_regex(
    pattern: str,
    symbols: Mapping[str, int],
    vocab_size: int,
    eos_token_ids: Sequence[int] = (0,),
    match: float = 1.0,
    fail: float = 0.0,
) -> Automaton:
    r"""Pays `match` for a response that a regular expression over tokens matches as a whole, else `fail`.

    Blanks separate symbols. `.` is any token, `|` means or, `*` any number of times, `+` at least once, `?` at most
    once, and parentheses group: "the ( big | small )* cat .?". A backslash before such a character makes it part of a
    symbol. Only `.` matches a token without a symbol. The EOS is not matched: it leaves the state as it is.

    Thompson's construction, the subset construction, and Moore's minimisation (Hopcroft, Motwani and Ullman 2006,
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
    check_token_ids("eos_token_ids", eos_token_ids, vocab_size)
    check_token_ids("symbols", symbols.values(), vocab_size)
    for symbol, token in symbols.items():
        if token in eos_token_ids:
            raise InvalidArgumentError(f"`symbols` must not name an EOS, and {symbol!r} is token {token}.")
    parser = _Parser(pattern, symbols)
    eos = sorted(set(eos_token_ids))
    letters = sorted(parser.used)
    classes = classify_tokens([*eos, *letters], vocab_size)
    letter_of = {len(eos) + i: token for i, token in enumerate(letters)}

    def step(state: frozenset[int], column: int) -> frozenset[int]:
        return state if column < len(eos) else parser.step(state, letter_of.get(column))

    return build_smallest(parser.start, step, lambda state: match if parser.end in state else fail, classes)


class _Parser:
    """A regular expression as a nondeterministic automaton (Thompson 1968).

    Each `_parse_*` method reads one piece of the pattern, from the next lexeme on, and returns the first and the last
    of the states that it adds for that piece.

    Attributes:
        start: the states before the first letter. end: the state that accepts. used: token ids of its symbols.
    """

    def __init__(self, pattern: str, symbols: Mapping[str, int]) -> None:
        self._pattern = pattern
        self._symbols = symbols
        self._lexemes = [(m[0], m.start()) for m in re.finditer(r"[|*+?().]|(?:\\.|[^\s|*+?().\\])+|\\", pattern)]
        self._next = 0
        self._empty: list[list[int]] = []  # by state, the states reached without a letter
        # By state, the letter that is read there (None: any) and the state after it.
        self._read: list[tuple[int | None, int] | None] = []
        self.used: set[int] = set()
        first, self.end = self._parse_alternatives()
        if self._next < len(self._lexemes):
            raise self._make_error("a parenthesis closes that none opened")
        self.start = self._close([first])

    def step(self, states: frozenset[int], token: int | None) -> frozenset[int]:
        """The states after one more token; None is a token that no symbol names."""
        arrows = [self._read[state] for state in states]
        return self._close([arrow[1] for arrow in arrows if arrow is not None and arrow[0] in (None, token)])

    def _close(self, states: list[int]) -> frozenset[int]:
        found = set(states)
        while states:
            new = set(self._empty[states.pop()]) - found
            found |= new
            states.extend(new)
        return frozenset(found)

    def _add_state(self) -> int:
        self._empty.append([])
        self._read.append(None)
        return len(self._empty) - 1

    def _peek(self) -> str:
        return self._lexemes[self._next][0] if self._next < len(self._lexemes) else ""

    def _make_error(self, what: str) -> InvalidArgumentError:
        index = self._lexemes[self._next][1] if self._next < len(self._lexemes) else len(self._pattern)
        return InvalidArgumentError(
            f"`pattern` must be a regular expression over symbols, got {self._pattern!r}: at character {index}, {what}."
        )

    def _parse_alternatives(self) -> tuple[int, int]:
        start = self._add_state()
        end = self._add_state()
        while True:
            first, last = self._parse_sequence()
            self._empty[start].append(first)
            self._empty[last].append(end)
            if self._peek() != "|":
                return start, end
            self._next += 1

    def _parse_sequence(self) -> tuple[int, int]:
        start = end = self._add_state()
        while self._peek() not in ("", "|", ")"):
            first, last = self._parse_repeated()
            self._empty[end].append(first)
            end = last
        return start, end

    def _parse_repeated(self) -> tuple[int, int]:
        start, end = self._parse_atom()
        sign = self._peek()
        if sign not in ("*", "+", "?"):
            return start, end
        self._next += 1
        if self._peek() in ("*", "+", "?"):
            raise self._make_error(f"{self._peek()!r} follows {sign!r}; put what it repeats in parentheses")
        first = self._add_state()
        last = self._add_state()
        self._empty[first].append(start)
        self._empty[end].append(last)
        if sign != "?":
            self._empty[end].append(start)
        if sign != "+":
            self._empty[first].append(last)
        return first, last

    def _parse_atom(self) -> tuple[int, int]:
        lexeme = self._peek()
        if lexeme in ("*", "+", "?"):
            raise self._make_error(f"{lexeme!r} has nothing to repeat")
        if lexeme == "\\":
            raise self._make_error("a backslash has nothing after it")
        if lexeme == "(":
            return self._parse_group()
        letter = None
        if lexeme != ".":
            name = re.sub(r"\\(.)", r"\1", lexeme)
            if name not in self._symbols:
                raise unknown_name(f"pattern[{self._lexemes[self._next][1]}]", name, self._symbols)
            letter = self._symbols[name]
            self.used.add(letter)
        self._next += 1
        start = self._add_state()
        end = self._add_state()
        self._read[start] = (letter, end)
        return start, end

    def _parse_group(self) -> tuple[int, int]:
        opened = self._next
        self._next += 1
        inside = self._parse_alternatives()
        if self._peek() != ")":
            self._next = opened
            raise self._make_error("a parenthesis opens that none closes")
        self._next += 1
        return inside
