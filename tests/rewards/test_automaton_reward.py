"""The reward that an automaton pays."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from automata_by_hand import GOOD, by_hand, count_tokens
from conftest import TinyProblem

from lmgym.automata import Automaton, phrases
from lmgym.errors import InvalidArgumentError, RewardError
from lmgym.rewards.automaton import AutomatonReward
from lmgym.rewards.base import score


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
        return count_tokens([prompt[-1]], range(10), 4)

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
    reward = AutomatonReward(lambda prompt: count_tokens([1], [0, 1], 3))
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
    automata = {1: paid, 2: count_tokens([1, 4], [0, 1, -1], 6), 3: phrases([[4, 1]], 6)}
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
