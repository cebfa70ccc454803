"""One rule for the end of a response: whatever steps, replays, samples or solves is held to it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lmgym.automata import length
from lmgym.ending import EndRule
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.models.policy import CausalPolicy
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.automaton import solve_automaton
from lmgym.optimum.smc import smc
from lmgym.optimum.tree import Tree
from lmgym.optimum.verifiable import check_complete
from lmgym.rewards.automaton import AutomatonReward
from lmgym.rollout import collect
from lmgym.tasks import Task

Response = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A task whose score tells the length of a response."""

    task: Task
    lm: CausalLM
    eos: frozenset[int]

    @classmethod
    def draw(cls, seed: int) -> Case:
        """3 to 5 tokens, of which 1 to 3 end a response; up to 4 tokens a response."""
        rng = np.random.default_rng(seed)
        vocab_size = int(rng.integers(3, 6))
        horizon = int(rng.integers(1, 5))
        return cls.make(rng, vocab_size, int(rng.integers(1, 4)), horizon, int(rng.integers(horizon)))

    @classmethod
    def make(cls, rng: np.random.Generator, vocab_size: int, ends: int, horizon: int, min_new_tokens: int) -> Case:
        symbols = [f"s{i}" for i in range(1, vocab_size)]
        lm = markov_lm(dirichlet_rows(rng, vocab_size, vocab_size, 1.0), symbols)
        eos = frozenset(rng.choice(vocab_size, ends, replace=False).tolist())
        lm.eos_token_ids = eos
        task = Task(
            name="ends",
            model=lm,
            reward=AutomatonReward(length(horizon, np.arange(horizon + 1.0), vocab_size)),
            prompts={"test": ["s1", "s2 s1"]},
            kl_coef=0.5,
            max_new_tokens=horizon,
            min_new_tokens=min_new_tokens,
        )
        return cls(task, lm, eos)

    def find_end(self, tokens: Sequence[int]) -> int | None:
        """The rule in plain Python: the position of the last token, or None where the response goes on."""
        for t in range(len(tokens)):
            if t + 1 == self.task.max_new_tokens:
                return t
            if tokens[t] in self.eos and t + 1 > self.task.min_new_tokens:
                return t
        return None

    def strings(self) -> Iterator[Response]:
        """Every string of 1 to T + 1 tokens."""
        for n in range(1, self.task.max_new_tokens + 2):
            yield from itertools.product(range(self.lm.vocab_size), repeat=n)

    def whole(self) -> set[Response]:
        """Every response that ends with its last token."""
        return {y for y in self.strings() if self.find_end(y) == len(y) - 1}

    def streams(self) -> list[Response]:
        """Every string of T tokens, most of which go on after an end."""
        return list(itertools.product(range(self.lm.vocab_size), repeat=self.task.max_new_tokens))[::3]

    def envs(self, num_envs: int) -> RLHFVectorEnv:
        return RLHFVectorEnv(num_envs, autoreset_mode="SameStep", task=self.task, device="cpu", split="test")


# --- what each part takes for a whole response --------------------------------------------------------------------


def check_stepping(case: Case) -> None:
    streams = np.array(case.streams())
    envs = case.envs(len(streams))
    envs.reset(seed=0)
    ended = np.zeros(len(streams), dtype=bool)
    for t in range(case.task.max_new_tokens):
        _, _, terminated, _, infos = envs.step(streams[:, t])
        for i in np.flatnonzero(~ended):
            assert terminated[i] == (case.find_end(streams[i, : t + 1]) == t)
            if terminated[i]:
                reason = "eos" if is_by_eos(case, streams[i, : t + 1]) else "length"
                assert infos["final_info"]["finish_reason"][i] == reason
        ended |= terminated
    assert ended.all()


def is_by_eos(case: Case, response: Any) -> bool:
    return int(response[-1]) in case.eos and len(response) > case.task.min_new_tokens


def check_prefixes(case: Case) -> None:
    engine = case.envs(1).engine
    for prefix in case.strings():
        if len(prefix) < case.task.max_new_tokens:
            assert accepts(lambda y=prefix: engine.check_prefix(y)) == (case.find_end(prefix) is None)


def check_replay(case: Case) -> None:
    streams = case.streams()
    envs = case.envs(1)
    replay = envs.replay([envs.engine.prompts[0]] * len(streams), np.array(streams))
    assert replay.response_mask.sum(1).tolist() == [(case.find_end(y) or 0) + 1 for y in streams]
    lengths = replay.response_mask.sum(1)
    reasons = ["eos" if is_by_eos(case, y[:n]) else "length" for y, n in zip(streams, lengths, strict=True)]
    assert replay.outcomes.finish_reasons == reasons


def check_collect(case: Case) -> None:
    episodes = collect(case.envs(1), CausalPolicy(case.lm), 64, generator=torch.Generator().manual_seed(0))
    for tokens, log_probs in zip(episodes.response_ids.tolist(), episodes.log_probs, strict=True):
        n = int((log_probs != 0).sum())  # tokens that were drawn
        assert case.find_end(tokens) == n - 1


def check_smc(case: Case) -> None:
    prompts = case.lm.encode_all(tuple(case.task.prompts["test"]))
    generator = torch.Generator().manual_seed(0)
    found = smc(case.task, prompts, CausalPolicy(case.lm), 32, generator)
    for x in range(len(prompts)):
        for s in range(32):
            response = found.response(x, s)
            assert case.find_end(response) == len(response) - 1
    strings = list(case.strings())
    for y in strings[:: max(len(strings) // 16, 1)]:
        is_whole = case.find_end(y) == len(y) - 1
        assert accepts(lambda y=y: smc(case.task, prompts[:1], CausalPolicy(case.lm), 2, generator, retained=[y])) == (
            is_whole
        )


def check_tree(case: Case) -> None:
    episodes = Tree.of(case.task).episodes
    rows = zip(episodes.response_ids.tolist(), episodes.lengths.tolist(), strict=True)
    times_found = Counter(tuple(row[:n]) for row, n in rows)
    assert set(times_found.values()) == {2}  # once for each prompt
    # compared outside `assert`: where $CI is set pytest writes a whole diff of the two, which takes minutes
    is_complete = times_found.keys() == case.whole()
    assert is_complete


def check_automaton_solver(case: Case) -> None:
    (solution,) = solve_automaton(case.task).policy.solutions  # type: ignore[union-attr]
    scores, probs = solution.score_distribution()
    table = case.lm.model.rows.double()
    for row, prompt in enumerate(case.lm.encode_all(tuple(case.task.prompts["test"]))):
        by_length = dict.fromkeys(scores.tolist(), 0.0)
        for y in case.whole():
            steps = itertools.pairwise([prompt[-1], *y])
            by_length[float(len(y))] += float(np.prod([table[a, b].item() for a, b in steps]))
        assert probs[row].tolist() == pytest.approx(list(by_length.values()), abs=1e-6)


def check_verifiable_solver(case: Case) -> None:
    for y in case.strings():
        assert accepts(lambda y=y: check_complete(y, case.lm, case.task)) == (case.find_end(y) == len(y) - 1)


def accepts(call: Callable[[], Any]) -> bool:
    try:
        call()
    except InvalidArgumentError:
        return False
    return True


CHECKS = [
    check_stepping,
    check_prefixes,
    check_replay,
    check_collect,
    check_smc,
    check_tree,
    check_automaton_solver,
    check_verifiable_solver,
]


@pytest.mark.parametrize("check", CHECKS)
def test_every_part_ends_responses_by_the_same_rule(check: Callable[[Case], None]) -> None:
    for seed in range(12):
        check(Case.draw(seed))


def early(self: EndRule[Any], tokens: Any, t: Any) -> Any:
    return self.is_eos[tokens] & (t + 1 >= self.min_new_tokens)


def late(self: EndRule[Any], tokens: Any, t: Any) -> Any:
    return self.is_eos[tokens] & (t > self.min_new_tokens)


@pytest.mark.parametrize("mutant", [early, late])
@pytest.mark.parametrize("check", CHECKS)
def test_an_end_one_token_off_is_seen_in_every_part(
    check: Callable[[Case], None], mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case.make(np.random.default_rng(5), 4, 2, horizon=4, min_new_tokens=2)
    check(case)
    monkeypatch.setattr(EndRule, "is_end_by_eos", mutant)
    with pytest.raises(AssertionError):
        check(case)


# --- the class itself ---------------------------------------------------------------------------------------------


def test_the_rule_answers_in_arrays_and_in_tensors() -> None:
    is_eos = np.array([False, True, True])
    rule = EndRule(is_eos, min_new_tokens=1, horizon=3)
    assert rule.is_end_by_eos(np.array([1, 1, 0]), np.array([0, 1, 1])).tolist() == [False, True, False]
    assert rule.is_end(np.array([1, 0]), np.array([0, 2])).tolist() == [False, True]
    tensors = EndRule(torch.from_numpy(is_eos), min_new_tokens=1, horizon=3)
    assert tensors.is_end(torch.tensor([0, 1, 2]), 1).tolist() == [False, True, True]
    assert tensors.find_ending_tokens(0).tolist() == [False, False, False]
    assert tensors.find_ending_tokens(1).tolist() == [False, True, True]
    assert tensors.find_ending_tokens(2).tolist() == [True, True, True]


def test_what_stands_after_an_end_is_not_read() -> None:
    rule = EndRule(np.array([True, False]), min_new_tokens=1, horizon=4)
    lengths, by_eos = rule.find_ends(np.array([[1, 0, -5, 99], [0, 1, 1, 1], [0, 1, 1, 0], [1, -1, 0, 7]]))
    assert lengths.tolist() == [2, 4, 4, 3]
    assert by_eos.tolist() == [True, False, True, True]
