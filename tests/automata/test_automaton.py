"""Automata against their definition, one token at a time."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from automata_by_hand import GOOD, by_hand, random_automaton

from lmgym.automata import Automaton
from lmgym.errors import InvalidArgumentError
from lmgym.rewards.automaton import AutomatonReward


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_reads_as_one_token_at_a_time_does(seed: int) -> None:
    automaton = random_automaton(seed)
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 5, n).tolist() for n in rng.permutation([0, 0, 1, 2, 3, 3, 7, 12])]
    assert automaton.score(ids) == pytest.approx([by_hand(automaton, y) for y in ids], abs=1e-12)
    states, collected = automaton.read(ids)
    assert states.dtype == np.int64
    assert collected.dtype == np.float64
    assert collected + automaton.payments[states] == pytest.approx(automaton.score(ids))
    assert all(automaton.score([y])[0] == together for y, together in zip(ids, automaton.score(ids), strict=True))


def test_no_response_and_an_empty_one() -> None:
    automaton = random_automaton(0)
    assert automaton.score([]).shape == (0,)
    states, collected = automaton.read([[]])
    assert (states.tolist(), collected.tolist()) == ([automaton.initial], [0.0])


def test_tokens_are_paid_in_the_state_they_are_read_in() -> None:
    """State 0 pays 1 for token 1 and goes on; state 1 pays 10 for it; the end pays 100 in state 1."""
    automaton = Automaton.dense([[0, 1], [1, 1]], [0, 100], [[0, 1], [0, 10]])
    assert automaton.score([[1], [0, 1], [1, 1], [1, 0, 1], [0]]).tolist() == [101, 101, 111, 111, 0]


@pytest.mark.parametrize("with_tokens", [True, False])
def test_dense_merges_equal_columns_and_scores_alike(with_tokens: bool) -> None:
    wide = random_automaton(3, states=3, columns=4, size=9)
    tokens = None if wide.token_payments is None or not with_tokens else wide.token_payments
    dense = Automaton.dense(
        wide.transitions[:, wide.classes], wide.payments, None if tokens is None else tokens[:, wide.classes],
        initial=wide.initial,
    )  # fmt: skip
    columns = {
        (*wide.transitions[:, c].tolist(), *(() if tokens is None else tokens[:, c].tolist()))
        for c in set(wide.classes.tolist())
    }
    assert dense.transitions.shape == (3, len(columns))
    assert len(dense.classes) == 9
    ids = np.random.default_rng(1).integers(0, 9, (200, 6)).tolist()
    twin = Automaton(wide.transitions, wide.payments, wide.classes, tokens, wide.initial)
    assert dense.score(ids) == pytest.approx([by_hand(twin, y) for y in ids], abs=1e-12)


def test_columns_that_only_pay_differently_stay_apart() -> None:
    same = [[0, 0, 0], [1, 1, 1]]
    assert Automaton.dense(same, [0, 1]).transitions.shape == (2, 1)
    paid = Automaton.dense(same, [0, 1], [[0, 0, 2], [0, 0, 0]])
    assert paid.classes.tolist() == [0, 0, 1]
    assert paid.score([[2, 2, 1]]).tolist() == [4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transitions": [[0, 2], [1, 0]]}, "`transitions` must be from 0 to 1, the 2 states, got 2."),
        ({"transitions": [[0, -1], [1, 0]]}, "`transitions` must be from 0 to 1, the 2 states, got -1."),
        ({"transitions": [0, 1]}, r"`transitions` must have shape \(S, C\) with S and C >= 1, got \(2,\)."),
        ({"transitions": np.zeros((0, 2), int)}, "S and C >= 1"),
        ({"transitions": [[0.0, 1.0], [1.0, 0.0]]}, "`transitions` must be an array of ints, got dtype float64."),
        ({"payments": [0.0]}, r"`payments` must have shape \(2,\), as `transitions` has it, got \(1,\)."),
        ({"payments": [0.0, math.nan]}, "`payments` must be finite, got nan."),
        ({"classes": [0, 2, 1]}, "`classes` must be from 0 to 1, the 2 columns of `transitions`, got 2."),
        ({"classes": [[0, 1]]}, r"`classes` must have shape \(V,\)"),
        ({"token_payments": [[0, 0]]}, r"`token_payments` must have shape \(2, 2\)"),
        ({"token_payments": [[0, 0], [math.inf, 0]]}, "`token_payments` must be finite, got inf."),
        ({"initial": 2}, "`initial` must be an int >= 0 and <= 1, got 2."),
    ],
)
def test_tables_that_cannot_be(change: dict[str, Any], message: str) -> None:
    Automaton(**GOOD)
    with pytest.raises(InvalidArgumentError, match=message):
        Automaton(**{**GOOD, **change})


@pytest.mark.parametrize("token", [3, -1])
def test_a_token_outside_the_vocabulary_is_named(token: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`ids` must be token ids from 0 to 2, .*, got {token}."):
        Automaton(**GOOD).score([[1, 2], [0, token]])


def test_torch_is_not_loaded() -> None:
    code = (
        "import sys, lmgym.rewards.automaton, lmgym.rewards.noise; print({'torch', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_range_of_scores_is_that_of_all_responses() -> None:
    rng = np.random.default_rng(0)
    for tokens in (None, rng.normal(size=(3, 2)).round(2)):
        automaton = Automaton(rng.integers(0, 3, (3, 2)), rng.normal(size=3).round(2), np.array([0, 1, 1]), tokens)
        responses = [ids for n in range(5) for ids in itertools.product(range(3), repeat=n)]
        scores = automaton.score(responses)
        assert automaton.score_range(4) == pytest.approx((scores.min(), scores.max()))
        assert AutomatonReward(automaton).score_range([1], 4) == automaton.score_range(4)
        assert automaton.equals(Automaton(automaton.transitions, automaton.payments, automaton.classes, tokens))
        assert not automaton.equals(Automaton(automaton.transitions, automaton.payments + 1, automaton.classes, tokens))
