"""Regular expressions over tokens against Python's own, over all short strings."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
from automata_by_hand import EOS, count_distinct_states
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgym.automata import from_regex
from lmgym.errors import InvalidArgumentError, UnknownNameError

SYMBOLS = {"a": 1, "b": 2, "c": 3}  # token 4 has no name
LETTERS = {1: "a", 2: "b", 3: "c", 4: "z"}
PATTERNS = [
    "a", "", ".", "a b", "a | b", "a*", "a+ b?", "( a | b )* c", ". * a . ", "( a b )+ | c", "a ( | b ) c",
    "( a | b ) * a ( a | b ) ( a | b )", "(a+)?b*(c|.)", "( ( a? )* b )+", "( )", "|", "c.?a|a(b c)*",
]  # fmt: skip


def matches(pattern: str, ids: Sequence[int]) -> bool:
    """Python's `re` on one character a token, without EOS."""
    text = "".join(LETTERS[token] for token in ids if token != EOS)
    return re.fullmatch(pattern.replace(" ", ""), text) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_as_python_does(pattern: str) -> None:
    automaton = from_regex(pattern, SYMBOLS, 5, (EOS,), match=2.0, fail=-1.0)
    ids = [y for n in range(5) for y in itertools.product(range(1, 5), repeat=n)]
    found = automaton.score(ids).tolist()
    assert found == [2.0 if matches(pattern, y) else -1.0 for y in ids]
    assert automaton.score([(*y, EOS) for y in ids]).tolist() == found
    assert automaton.score([(EOS, *y[:2], EOS, *y[2:]) for y in ids]).tolist() == found
    assert len(automaton.transitions) == count_distinct_states(automaton)


def atoms() -> st.SearchStrategy[str]:
    return st.recursive(
        st.sampled_from(["a", "b", "c", "."]),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("*+?")).map(lambda x: f"( {x[0]} ) {x[1]}"),
            st.tuples(inner, inner).map(lambda x: f"( {x[0]} | {x[1]} )"),
            st.tuples(inner, inner).map(" ".join),
        ),
        max_leaves=8,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(atoms(), st.integers(0, 2**32 - 1))
def test_any_pattern_matches_as_python_does(pattern: str, seed: int) -> None:
    automaton = from_regex(pattern, SYMBOLS, 5, (EOS,))
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 5, n).tolist() for n in rng.integers(0, 9, 60)]
    assert automaton.score(ids).tolist() == [float(matches(pattern, y)) for y in ids]


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("a", 3),  # before, after, dead
        (".", 3),
        (".*", 1),
        ("a*", 2),
        ("( a | . )*", 1),
        (".* a", 2),
        (".* a b", 3),
        ("( a | b )* a ( a | b ) ( a | b )", 9),  # the last three letters, and the dead state
        (".* a . .", 8),
        ("( a a ) * | ( a a a ) *", 7),  # a count mod 6, and the dead state
    ],
)
def test_the_smallest_automaton(pattern: str, states: int) -> None:
    automaton = from_regex(pattern, SYMBOLS, 5)
    assert len(automaton.transitions) == states
    assert automaton.initial == 0


def test_classes_are_as_few_as_the_pattern_tells_apart() -> None:
    automaton = from_regex("( a | b )* c", SYMBOLS, 1000, (0, 7))
    assert automaton.transitions.shape == (3, 4)
    assert automaton.classes[0] == automaton.classes[7] != automaton.classes[8]
    assert automaton.classes[1] == automaton.classes[2] != automaton.classes[3]
    assert automaton.score([[1, 2, 3, 7], [3, 7, 8], [7, 1, 0, 3]]).tolist() == [1, 0, 1]


def test_a_vocabulary_of_symbols_alone() -> None:
    """No token is left over that would need a dead state."""
    assert len(from_regex("( a | b )*", {"a": 1, "b": 2}, 3).transitions) == 1


def test_symbols_with_characters_of_the_syntax() -> None:
    names = {"(": 1, ")": 2, "*": 3, "a.b": 4, "\\": 5, "new york": 6}
    ids = [[1, 4, 2], [1, 1, 2], [1, 2], [3], [5, 6], [1, 4, 4, 2]]
    assert from_regex(r"\( a\.b* \)", names, 7).score(ids).tolist() == [1, 0, 1, 0, 0, 1]
    assert from_regex(r"\*|\\ new\ york", names, 7).score(ids).tolist() == [0, 0, 0, 1, 1, 0]


def test_two_names_of_one_token() -> None:
    assert from_regex("x y", {"x": 1, "y": 1}, 3).score([[1, 1], [1], [2, 2]]).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a ( b | c", "at character 2, a parenthesis opens that none closes."),
        ("( a ( b )", "at character 0, a parenthesis opens that none closes."),
        ("a b ) c", "at character 4, a parenthesis closes that none opened."),
        ("a | * b", "at character 4, '*' has nothing to repeat."),
        ("+", "at character 0, '+' has nothing to repeat."),
        ("(?a)", "at character 1, '?' has nothing to repeat."),
        ("a b*?", "at character 4, '?' follows '*'; put what it repeats in parentheses."),
        ("a \\", "at character 2, a backslash has nothing after it."),
    ],
)
def test_a_broken_pattern_says_where(pattern: str, message: str) -> None:
    expected = f"`pattern` must be a regular expression over symbols, got {pattern!r}: {message}"
    with pytest.raises(InvalidArgumentError, match=re.escape(expected)):
        from_regex(pattern, SYMBOLS, 5)


def test_an_unknown_symbol_and_bad_ids() -> None:
    with pytest.raises(UnknownNameError, match=r"`pattern\[6\]` must be one of .*, got 'flim'. Did you mean 'film'?"):
        from_regex("film (flim)*", {"film": 1, "soup": 2}, 3)
    with pytest.raises(InvalidArgumentError, match="`symbols` must be token ids from 0 to 2, got 3."):
        from_regex("a", SYMBOLS, 3)
    with pytest.raises(InvalidArgumentError, match="`symbols` must not name an EOS, and 'b' is token 2."):
        from_regex("a", SYMBOLS, 5, (2,))
    with pytest.raises(InvalidArgumentError, match="`eos_token_ids` must be token ids from 0 to 4, got 5."):
        from_regex("a", SYMBOLS, 5, (5,))
    with pytest.raises(InvalidArgumentError, match="`match` must be a finite number"):
        from_regex("a", SYMBOLS, 5, match=math.inf)
