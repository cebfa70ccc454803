"""Builders of automata against slow obvious twins, over all short strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from automata_by_hand import EOS, count_distinct_states, strings

from lmgym.automata import bounded_stack, length, phrases, positions
from lmgym.errors import LmGymError


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_length_counts_up_to_its_limit(limit: int) -> None:
    payments = [5.0, 7.0, -1.0, 2.0][: limit + 1]
    automaton = length(limit, payments, 3)
    ids = strings(3, 5)
    assert automaton.transitions.shape == (limit + 1, 1)
    assert automaton.score(ids).tolist() == [payments[min(len(y), limit)] for y in ids]


def balanced(ids: Sequence[int], pairs: Sequence[tuple[int, int]], depth: int, others: str) -> float:
    """An explicit stack."""
    if not ids or ids[-1] != EOS or EOS in ids[:-1]:
        return 0.0
    stack: list[int] = []
    deepest = 0
    closing = {b: a for a, b in pairs}
    for token in ids[:-1]:
        if token in closing:
            if not stack or stack.pop() != closing[token]:
                return 0.0
        elif token in closing.values():
            stack.append(token)
            deepest = max(deepest, len(stack))
        elif others == "reject":
            return 0.0
    return float(not stack and deepest == depth)


@pytest.mark.parametrize("others", ["ignore", "reject"])
@pytest.mark.parametrize(
    ("pairs", "depth", "longest"), [([(1, 2)], 1, 6), ([(2, 1)], 2, 6), ([(1, 2), (4, 3)], 2, 5), ([(1, 2)], 3, 7)]
)
def test_brackets_against_an_explicit_stack(
    pairs: list[tuple[int, int]], depth: int, longest: int, others: str
) -> None:
    size = 6 if len(pairs) == 2 else 4
    automaton = bounded_stack(pairs, depth, size, others=others)
    ids = strings(size, longest) if longest < 7 else [(*y, EOS) for y in strings(size, 6)]
    found = automaton.score(ids).tolist()
    assert found == [balanced(y, pairs, depth, others) for y in ids]
    assert sum(found) > 0


def test_brackets_have_as_few_states_as_can_be() -> None:
    """Heights 0..d before the depth was reached and after, less the one height that says so; dead and paid."""
    for depth in (1, 2, 4):
        assert len(bounded_stack([(1, 2)], depth, 3).transitions) == depth + (depth + 1) + 2
    assert len(bounded_stack([(1, 2), (3, 4)], 2, 5).transitions) == (1 + 2) + (1 + 2 + 4) + 2
    automaton = bounded_stack([(1, 2)], 2, 500, (0, 7), others="reject")
    assert automaton.transitions.shape[1] == 4  # opening, closing, EOS, all others
    assert automaton.score([[1, 1, 2, 2, 7], [1, 1, 2, 2, 0], [1, 1, 2, 2, 8], [1, 1, 2, 2]]).tolist() == [1, 1, 0, 0]


def test_two_kinds_of_brackets_must_nest() -> None:
    automaton = bounded_stack([(1, 2), (3, 4)], 2, 5)
    assert automaton.score([[1, 3, 4, 2, 0], [1, 3, 2, 4, 0], [1, 3, 4, 4, 0]]).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "wanted",
    [[[1]], [[1, 2]], [[1, 1, 2]], [[1, 2], [2, 1]], [[1, 2, 1], [2]], [[1], [1, 1], [2, 1, 1]], [[2, 0], [0]],
     [[0], [1], [2]], [[1, 2], [1, 2]]],
)  # fmt: skip
def test_phrases_against_substring_search(wanted: list[list[int]]) -> None:
    ids = strings(4, 7) if len(wanted) == 1 else strings(3, 7)
    size = 4 if len(wanted) == 1 else 3
    texts = ["".join(map(str, y)) for y in ids]
    keys = ["".join(map(str, p)) for p in wanted]
    counts = [sum(key in text for key in keys) for text in texts]
    automaton = phrases(wanted, size)
    assert automaton.score(ids) == pytest.approx([n / len(wanted) for n in counts])
    payments = [0.5, -1.0, 4.0, 9.0][: len(wanted) + 1]
    assert phrases(wanted, size, payments).score(ids).tolist() == [payments[n] for n in counts]
    done = int(np.flatnonzero(automaton.payments == 1)[0])
    assert (automaton.payments == 1).sum() == 1
    assert set(automaton.transitions[done].tolist()) == {done}


def test_phrases_have_as_few_states_as_can_be() -> None:
    assert len(phrases([[1, 2, 3]], 5).transitions) == 4
    assert len(phrases([[1], [2]], 5).transitions) == 4  # none, either, both
    assert phrases([[1, 2]], 50_000).transitions.shape == (3, 3)
    for wanted in ([[1, 2], [2, 1]], [[1, 2, 1], [2]]):
        automaton = phrases(wanted, 4)
        assert len(automaton.transitions) == count_distinct_states(automaton)


@pytest.mark.parametrize("targets", [[1], [2, 2, 0], [0, 1, 2, 1], []])
def test_positions_pays_position_by_position(targets: list[int]) -> None:
    automaton = positions(targets, 3)
    ids = strings(3, 6)
    expected = [float(sum(a == b for a, b in zip(y, targets, strict=False))) for y in ids]
    assert automaton.score(ids).tolist() == expected
    _, collected = automaton.read(ids)
    assert collected.tolist() == expected
    assert len(automaton.transitions) == len(targets) + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: length(2, [0, 1], 4), r"`payments` must have shape \(3,\)"),
        (lambda: length(-1, [], 4), "`limit` must be an int >= 0, got -1."),
        (lambda: length(0, [1], 0), "`vocab_size` must be an int >= 1, got 0."),
        (lambda: bounded_stack([(1, 1)], 2, 4), "`pairs` must be of distinct tokens, none an EOS"),
        (lambda: bounded_stack([(0, 1)], 2, 4), "`pairs` must be of distinct tokens, none an EOS"),
        (lambda: bounded_stack([(1, 2), (1, 3)], 2, 4), "`pairs` must be of distinct tokens, none an EOS"),
        (lambda: bounded_stack([(1, 4)], 2, 4), "`pairs` must be token ids from 0 to 3, got 4."),
        (lambda: bounded_stack([(1, 2)], 0, 4), "`depth` must be an int >= 1, got 0."),
        (lambda: bounded_stack([(1, 2)], 1, 4, others="ignored"), "got 'ignored'. Did you mean 'ignore'?"),
        (lambda: phrases([], 4), "`phrases` must be one or more phrases"),
        (lambda: phrases([[1], []], 4), "`phrases` must be one or more phrases of one or more tokens"),
        (lambda: phrases([[1, -1]], 4), "`phrases` must be token ids from 0 to 3, got -1."),
        (lambda: phrases([[1]], 4, [0, 1, 2]), r"`payments` must have shape \(2,\), got \(3,\)."),
        (lambda: positions([1, 4], 4), "`targets` must be token ids from 0 to 3, got 4."),
    ],
)
def test_arguments_that_cannot_be(call: Any, message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        call()
