"""Rewards of automata against slow obvious twins, over all short strings; and noise on top of a reward."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import TinyProblem, table_reward
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgym.errors import InvalidArgumentError, LmGymError, RewardError, UnknownNameError
from lmgym.rewards.automaton import (
    Automaton,
    AutomatonReward,
    bounded_stack,
    counter,
    from_regex,
    length,
    phrases,
    positions,
)
from lmgym.rewards.base import remove_noise, score
from lmgym.rewards.noise import NoisyReward

EOS = 0
SYMBOLS = {"a": 1, "b": 2, "c": 3}  # token 4 has no name


def strings(size: int, longest: int) -> list[tuple[int, ...]]:
    """All sequences of up to `longest` tokens below `size`, the empty one too."""
    return [y for n in range(longest + 1) for y in itertools.product(range(size), repeat=n)]


def by_hand(automaton: Automaton, ids: Sequence[int]) -> float:
    """The definition, one token at a time."""
    state, total = automaton.initial, 0.0
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


def seen_apart(automaton: Automaton) -> int:
    """Number of reachable states that some continuation of up to S tokens tells apart: the least that will do."""
    reached, front = {automaton.initial}, [automaton.initial]
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


# --- the automaton ---------------------------------------------------------------------------------------------------


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


GOOD: dict[str, Any] = {
    "transitions": [[0, 1], [1, 0]], "payments": [0.0, 1.0], "classes": [0, 1, 1], "token_payments": [[0, 0], [0, 1]],
}  # fmt: skip


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


# --- the reward ------------------------------------------------------------------------------------------------------


def test_one_automaton_for_all_prompts() -> None:
    automaton = Automaton(**GOOD)
    reward = AutomatonReward(automaton)
    ids = [[1, 1], [2], []]
    assert reward(["p"] * 3, [""] * 3, completion_ids=ids) == automaton.score(ids).tolist()
    assert reward.for_prompt([5, 6]) is automaton
    found = score(reward, ["p"] * 3, [""] * 3, completion_ids=ids, prompt_ids=[[1]] * 3)
    assert found == [by_hand(automaton, y) for y in ids]


def test_an_automaton_for_each_prompt_is_made_once() -> None:
    """The prompt's last token is the one to be counted."""
    made: list[tuple[int, ...]] = []

    def make(prompt: tuple[int, ...]) -> Automaton:
        made.append(prompt)
        return counter([prompt[-1]], 10, range(10), 4)

    reward = AutomatonReward(make)
    rng = np.random.default_rng(0)
    prompts = [[7, int(token)] for token in rng.integers(1, 4, 20)]
    ids = [rng.integers(0, 4, n).tolist() for n in rng.integers(0, 8, 20)]
    columns = {"completion_ids": ids, "prompt_ids": prompts}
    expected = [float(y.count(x[-1])) for x, y in zip(prompts, ids, strict=True)]
    assert len(set(expected)) > 2
    for _ in range(2):
        assert reward(["p"] * 20, [""] * 20, **columns) == expected
    assert sorted(made) == [(7, 1), (7, 2), (7, 3)]
    assert reward.for_prompt([7, 1]) is reward.for_prompt(np.array([7, 1]))
    assert reward.for_prompt([7, 1]).score([[1, 1, 2]]).tolist() == [2]
    assert len(made) == 3


def test_what_the_reward_cannot_do_without() -> None:
    reward = AutomatonReward(lambda prompt: counter([1], 2, [0, 1], 3))
    with pytest.raises(RewardError, match="needs 2 `prompt_ids`, one a completion, got none."):
        reward(["p"] * 2, [""] * 2, completion_ids=[[1], [2]])
    with pytest.raises(RewardError, match="needs 2 `prompt_ids`, one a completion, got 1."):
        reward(["p"] * 2, [""] * 2, completion_ids=[[1], [2]], prompt_ids=[[1]])
    with pytest.raises(InvalidArgumentError, match="`ids` must be token ids from 0 to 2, .*, got 9."):
        reward(["p"], [""], completion_ids=[[9]], prompt_ids=[[1]])
    with pytest.raises(RewardError, match=r"must make an Automaton of every prompt, and made None of \(3,\)."):
        AutomatonReward(lambda prompt: None).for_prompt([3])  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidArgumentError, match="`automaton` must be an Automaton or a callable"):
        AutomatonReward("a b")  # type: ignore[arg-type]


@pytest.mark.parametrize("per_prompt", [False, True])
def test_the_env_pays_what_the_automaton_says(per_prompt: bool) -> None:
    """Every response of the tiny problem, played: its length is 1 more with an EOS, and the EOS can be counted."""
    paid = Automaton.dense(
        [[1] * 6, [2] * 6, [3] * 6, [3] * 6], [9, 0.5, 0.25, 0.125], [[0, s, 0, 0, 0, s / 2] for s in (1, 2, 3, 4)]
    )
    automata = {1: paid, 2: counter([1, 4], 3, [0, 1, -1], 6), 3: phrases([[4, 1]], 6)}
    chosen = (lambda prompt: automata[len(prompt)]) if per_prompt else paid
    problem = TinyProblem(3, reward=AutomatonReward(chosen), missing_eos_penalty=0.0)
    env = gym.make("lmgym/RLHF-v0", task=problem.task)
    scores = set()
    for seed, response in enumerate(problem.responses[::5]):
        _, info = env.reset(seed=seed)
        for token in response:
            _, reward, terminated, _, info = env.step(token)
        assert terminated
        prompt = problem.lm.encode(info["prompt"])
        automaton = automata[len(prompt)] if per_prompt else paid
        assert info["score"] == by_hand(automaton, response)
        assert reward == pytest.approx(problem.kl_coef * info["ref_log_prob"] + info["score"], abs=1e-5)
        scores.add(info["score"])
    env.close()
    assert len(scores) > 4


# --- regular expressions ---------------------------------------------------------------------------------------------

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
    assert len(automaton.transitions) == seen_apart(automaton)


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
        ("a \\", "at character 2, a backslash has nothing behind it."),
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


# --- the other constructors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[1], [1, 3], [0, 2], [], [0, 1, 2, 3]])
@pytest.mark.parametrize("modulus", [1, 2, 3])
def test_counter_counts(tokens: list[int], modulus: int) -> None:
    payments = [0.5, -1.0, 3.0][:modulus]
    automaton = counter(tokens, modulus, payments, 4)
    ids = strings(4, 5)
    assert len(automaton.transitions) == modulus
    assert automaton.score(ids).tolist() == [payments[sum(map(y.count, tokens)) % modulus] for y in ids]


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
    texts, keys = ["".join(map(str, y)) for y in ids], ["".join(map(str, p)) for p in wanted]
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
        assert len(automaton.transitions) == seen_apart(automaton)


@pytest.mark.parametrize("targets", [[1], [2, 2, 0], [0, 1, 2, 1], []])
def test_positions_pays_place_by_place(targets: list[int]) -> None:
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
        (lambda: counter([4], 2, [0, 1], 4), "`tokens` must be token ids from 0 to 3, got 4."),
        (lambda: counter([1], 0, [], 4), "`modulus` must be an int >= 1, got 0."),
        (lambda: counter([1], 2, [0, 1, 2], 4), r"`payments` must have shape \(2,\)"),
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


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_has_its_mean_and_standard_deviation() -> None:
    n, sigma = 20_000, 0.7
    reward = NoisyReward(lambda prompts, completions, **_: [2.0 * len(c) for c in completions], sigma, seed=3)
    columns: dict[str, Any] = {"prompt_ids": [[1]] * n, "completion_ids": [[2]] * n}
    noise = np.array(score(reward, [""] * n, ["abc"] * n, **columns)) - 6.0
    assert abs(noise.mean()) < 4 * sigma / math.sqrt(n)
    assert abs(noise.std() - sigma) < 4 * sigma / math.sqrt(2 * n)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / math.sqrt(n)


def test_noise_is_drawn_anew_and_only_its_own() -> None:
    def inside(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return table_reward(prompts, completions, **columns)

    first, second, other = NoisyReward(inside, 0.5, seed=1), NoisyReward(inside, 0.5, seed=1), NoisyReward(inside, 0.5)
    call: dict[str, Any] = {"prompts": ["p"] * 3, "completions": [""] * 3, "completion_ids": [[1], [2, 3], [4]]}
    scores = [first(**call), first(**call)]
    assert scores == [second(**call), second(**call)]
    assert scores[0] != scores[1]
    assert other(**call) != scores[0]
    assert first.expected is inside
    assert NoisyReward(inside, 0.0)(**call) == inside(**call)
    assert [type(x) for x in first(**call)] == [float] * 3


def test_noise_goes_on_from_its_state() -> None:
    call: dict[str, Any] = {"prompts": ["p"] * 3, "completions": [""] * 3, "completion_ids": [[1], [2, 3], [4]]}
    reward, fresh = NoisyReward(table_reward, 0.5, seed=1), NoisyReward(table_reward, 0.5, seed=9)
    reward(**call)
    state = reward.get_state()
    text = json.dumps(state)
    expected = [reward(**call) for _ in range(3)]
    assert json.dumps(state) == text  # a copy, not a view of what runs on
    fresh.set_state(json.loads(text))
    assert [fresh(**call) for _ in range(3)] == expected
    reward.set_state(state)
    assert [reward(**call) for _ in range(3)] == expected


def test_noise_on_noise_is_independent_of_it_and_begins_and_goes_on_with_it() -> None:
    """With one seed for both the standard deviations would add, not the variances."""
    n = 20_000
    call: dict[str, Any] = {"prompts": [""] * n, "completions": [""] * n}
    reward = NoisyReward(NoisyReward(lambda prompts, completions: [0.0] * len(prompts), 1.0), 1.0)
    first = np.array(reward(**call))
    assert abs(first.std() - math.sqrt(2)) < 4 * math.sqrt(2 / (2 * n))
    state = json.loads(json.dumps(reward.get_state()))
    second = reward(**call)
    reward.set_state(state)
    assert reward(**call) == second
    reward.reseed(0)
    assert reward(**call) == first.tolist()
    with pytest.raises(InvalidArgumentError, match="`state` must come from `NoisyReward.get_state`"):
        reward.set_state(NoisyReward(table_reward, 1.0).get_state())


def test_what_is_paid_on_average_is_found_under_any_number_of_layers() -> None:
    assert remove_noise(table_reward) is table_reward
    assert remove_noise(NoisyReward(table_reward, 1.0)) is table_reward
    assert remove_noise(NoisyReward(NoisyReward(table_reward, 1.0), 1.0)) is table_reward

    def own(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(prompts)

    own.expected = 0.5  # type: ignore[attr-defined]
    assert remove_noise(own) is own  # a number of its own, not a reward
    own.expected = own  # type: ignore[attr-defined]
    assert remove_noise(own) is own


@pytest.mark.parametrize("state", [{}, {"bit_generator": "MT19937"}, {"bit_generator": "PCG64"}, 3])
def test_a_state_of_something_else(state: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`state` must come from `NoisyReward.get_state`"):
        NoisyReward(table_reward, 0.5).set_state(state)


def test_noise_that_cannot_be() -> None:
    with pytest.raises(InvalidArgumentError, match="`sigma` must be a finite number >= 0, got -1"):
        NoisyReward(table_reward, -1)
    with pytest.raises(InvalidArgumentError, match="`seed` must be an int >= 0, got None"):
        NoisyReward(table_reward, 1, seed=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="`reward` must be a callable, got 'x'."):
        NoisyReward("x", 1)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="must return 2 scores"):
        NoisyReward(lambda **_: [1.0], 1)(["p"] * 2, [""] * 2)


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
