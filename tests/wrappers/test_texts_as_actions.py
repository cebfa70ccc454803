"""Texts in, texts out; and a task as TRL takes it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
from conftest import WORDS, word_tokenizer
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence

import lmgym  # noqa: F401 - registers the environments
from lmgym.errors import InvalidActionError, InvalidArgumentError
from lmgym.tasks import make_task
from lmgym.trl import as_trl
from lmgym.wrappers import TextActions

Parts = dict[str, Any]
EOS = 1
T = 8


def make(parts: Parts) -> Any:
    return gym.make("lmgym/RLHFText-v0", **parts)


@pytest.mark.parametrize(
    ("words", "reason"), [(3, "eos"), (0, "eos"), (T - 1, "eos"), (T, "length"), (T + 4, "length")]
)
def test_a_text_earns_what_its_tokens_earn(parts: Parts, words: int, reason: str) -> None:
    tokenizer = word_tokenizer()
    env = make(parts)
    prompt, _ = env.reset(options={"prompt": "a book"})
    assert prompt == "a book"
    response = " ".join(WORDS[5 : 5 + words])
    text, reward, terminated, truncated, info = env.step(response and f" {response}")
    assert (terminated, truncated, info["finish_reason"]) == (True, False, reason)
    assert text == " ".join(["a book", *WORDS[5 : 5 + min(words, T)]]) == info["prompt"] + info["response"]
    bandit = gym.make("lmgym/RLHFBandit-v0", **parts)
    bandit.reset(options={"prompt": "a book"})
    ids = (tokenizer.convert_tokens_to_ids(response.split()) + [EOS] * T)[:T]
    assert reward == pytest.approx(bandit.step(ids)[1], abs=1e-5)


def test_the_checker_finds_nothing_to_say_and_a_spec_makes_it_again(parts: Parts) -> None:
    env = make(parts)
    check_env(env.unwrapped, skip_render_check=True)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert (again.action_space, again.observation_space) == (env.action_space, env.observation_space)
    assert data_equivalence(again.reset(seed=1), env.reset(seed=1))
    assert data_equivalence(again.step(" good"), env.step(" good"))
    envs = gym.make_vec("lmgym/RLHFText-v0", num_envs=2, vectorization_mode="sync", **parts)
    assert len(envs.reset(seed=0)[0]) == 2
    assert envs.step((" good", " bad and dull"))[2].all()


@pytest.mark.parametrize("action", [5, None, [" good"], b"good", ["good", "bad"]], ids=repr)
def test_what_is_no_text_is_refused(parts: Parts, action: Any) -> None:
    env = make(parts)
    env.reset(seed=0)
    with pytest.raises(InvalidActionError, match="`action` must be a text, got"):
        env.step(action)
    with pytest.raises(InvalidArgumentError, match="`env` must take whole responses"):
        TextActions(gym.make("lmgym/RLHF-v0", **parts))


def test_outside_an_episode_there_is_nothing_to_step(parts: Parts) -> None:
    env = make(parts).env
    with pytest.raises(ResetNeeded):
        env.step("good")


# --- TRL -------------------------------------------------------------------------------------------------------------


def rows_of(data: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in data]


def test_a_task_as_trl_takes_it() -> None:
    """The prompts in order, and scores as the env pays them, with and without the ids that TRL hands over."""
    data, pay = as_trl("keyword-8", split="test", device="cpu")
    task = make_task("keyword-8")
    lm = task.reference("cpu")
    rows = rows_of(data)
    assert [row["prompt"] for row in rows] == list(task.prompts["test"])
    assert pay.__name__ == "keyword_8"
    env: Any = gym.make("lmgym/RLHFBandit-v0", task="keyword-8", device="cpu")
    responses = [[1, 2, 0], [1, 1, 0], [3, 1, 2, 4, 5, 6, 7, 8], [0]]
    prompts = [rows[0]["prompt"]] * 4
    expected = []
    for response in responses:
        env.reset(options={"prompt": prompts[0]})
        expected.append(env.step((response + [0] * 8)[:8])[4]["score"])
    completions = lm.completions([lm.encode(prompts[0])] * 4, responses)
    assert pay(prompts, completions, completion_ids=responses, trainer_state=None) == expected
    assert pay(prompts=prompts, completions=completions) == expected
    assert expected == [1.0, 0.0, 1.0, 0.0]


def test_columns_and_the_penalty_reach_trl(parts: Parts) -> None:
    def reward(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    rows = [{"prompt": "a book", "answer": "good"}, {"prompt": "the film", "answer": "bad"}]
    task = make_task("reviews", model=parts["model"], reward=reward, prompts=rows, missing_eos_penalty=0.5)
    data, pay = as_trl(task, device="cpu")
    assert rows_of(data) == rows
    ids = [[12, EOS], [12]]
    found = pay(["a book", "the film"], [" good", " good"], completion_ids=ids, answer=["good", "bad"])
    assert found == [1.0, -0.5]
