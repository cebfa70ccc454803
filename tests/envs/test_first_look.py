"""What a beginner looks at: texts of ids and episodes, objects in one line, the optimum of any task."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TinyProblem, byte_tokenizer, gpt2, table_reward, word_count

import lmgym
from lmgym.envs.rendering import Frame, scale_costs, to_terminal, to_text, wait_for_turn
from lmgym.errors import InvalidActionError, InvalidArgumentError, UnknownNameError
from lmgym.evaluation import evaluate
from lmgym.intervals import Interval
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.optimum import solve
from lmgym.optimum.bounds import multi_sample_bound
from lmgym.rollout import collect, collect_steps
from lmgym.tasks import Task, make_task
from lmgym.tasks.registry import Suite

ID = "lmgym/RLHF-v0"
TINY = TinyProblem()


@pytest.fixture
def env(parts: dict[str, Any]) -> Any:
    made = gym.make(ID, **parts).unwrapped
    made.reset(seed=0, options={"prompt": "the film was"})
    return made


@pytest.fixture(scope="module")
def letters() -> CausalLM:
    """A model over bytes, in whose tokens a blank is a part of the word after it."""
    tokenizer = byte_tokenizer()
    return CausalLM(freeze(gpt2(len(tokenizer), n_positions=64)), tokenizer)


# -- texts -----------------------------------------------------------------------------------------------------------


def test_an_action_means_what_the_tokenizer_says(env: Any) -> None:
    meanings = env.get_action_meanings()
    assert len(meanings) == env.action_space.n
    for word in ("film", "good"):
        assert meanings[env.tokenizer.convert_tokens_to_ids(word)] == word
    assert meanings[env.tokenizer.eos_token_id] == env.tokenizer.eos_token
    assert env.get_wrapper_attr("get_action_meanings")() == meanings


def test_ids_are_decoded_however_they_come(env: Any) -> None:
    ids = env.tokenizer("the film")["input_ids"]
    for given in (ids, tuple(ids), np.array(ids), torch.tensor(ids), np.array([-1, *ids, -1])):
        assert env.decode(given) == "the film"
    assert env.decode(ids[1]) == env.decode(np.int64(ids[1])) == "film"
    assert env.decode([env.tokenizer.eos_token_id]) == env.tokenizer.eos_token
    assert env.decode([]) == ""
    observation, _ = env.reset(options={"prompt": "a book"})
    assert env.decode(observation) == "a book"  # without its padding


@pytest.mark.parametrize("given", [[0.5], [[1, 2]], [10**6], [-2], "film", None, {"input_ids": [1]}])
def test_what_is_no_id_is_not_decoded(env: Any, given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`ids` must be"):
        env.decode(given)


def test_the_text_grows_with_the_episode(env: Any) -> None:
    assert env.text() == "the film was"
    for word in ("good", "and"):
        env.step(env.tokenizer.convert_tokens_to_ids(word))
    assert env.text() == "the film was good and"
    env.step(env.tokenizer.eos_token_id)
    assert env.text() == "the film was good and"  # it can still be read
    fresh = gym.make(ID, task=TINY.task, split="train").unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        fresh.text()  # type: ignore[attr-defined]


def test_every_row_has_its_text(parts: dict[str, Any]) -> None:
    envs: Any = gym.make_vec(ID, num_envs=2, autoreset_mode="Disabled", **parts)
    envs.reset(seed=0, options={"prompt": "it"})
    envs.step([envs.tokenizer.convert_tokens_to_ids(word) for word in ("was", "is")])
    assert envs.text() == ("it was", "it is")
    assert envs.get_action_meanings()[envs.tokenizer.convert_tokens_to_ids("is")] == "is"


def test_a_word_as_an_action_is_answered_with_its_id(env: Any) -> None:
    good, film = (env.tokenizer.convert_tokens_to_ids(word) for word in ("good", "film"))
    for action in ("good", np.str_("good"), ["good"], np.array(["good"])):
        with pytest.raises(InvalidActionError, match=rf"got the text 'good'\. Its id is {good}\."):
            env.step(action)
    with pytest.raises(InvalidActionError, match=rf"Its ids are \[{good}, {film}\]: step them one by one"):
        env.step("good film")
    with pytest.raises(InvalidActionError, match="has no token for it"):
        env.step("zzz")
    table = gym.make("lmgym/Keyword-8-v0")  # whose tokenizer has no token for what it does not know
    table.reset(seed=0)
    with pytest.raises(InvalidActionError, match="has no token for it"):
        table.step("zzz")
    assert env.text() == "the film was"  # nothing was stepped
    envs = gym.make_vec(ID, num_envs=2, task=TINY.task, split="train")
    envs.reset(seed=0)
    with pytest.raises(InvalidActionError, match="got the text 'y'"):
        envs.step(["y", "z"])
    bandit = gym.make("lmgym/RLHFBandit-v0", task=TINY.task, split="train")
    bandit.reset(seed=0)
    with pytest.raises(InvalidActionError, match="got the text 'y'"):
        bandit.unwrapped.step(["y", "z"])


def test_a_word_with_and_without_a_blank_is_answered_with_both_ids(letters: CausalLM) -> None:
    env = gym.make(ID, model=letters, reward=word_count, prompts=["a"], max_new_tokens=4)
    env.reset(seed=0)
    vocabulary = letters.tokenizer.get_vocab()
    blank = next((t for t in vocabulary if t.startswith("Ġ") and len(t) > 1 and t[1:] in vocabulary), None)
    word = "q" if blank is None else blank[1:]
    with pytest.raises(InvalidActionError, match=rf"got the text '{word}'\. Its id is {vocabulary[word]}"):
        env.unwrapped.step(word)


@pytest.mark.parametrize("gather", [collect, collect_steps])
def test_episodes_know_their_texts(parts: dict[str, Any], gather: Any) -> None:
    envs: Any = gym.make_vec(ID, num_envs=4, autoreset_mode="SameStep", **parts)
    envs.reset(seed=0)
    episodes = gather(envs, CausalPolicy(envs.engine.lm), 4, generator=torch.Generator().manual_seed(0))
    for i, (prompt, response) in enumerate(episodes.texts()):
        chosen = episodes.input_ids[i][episodes.attention_mask[i]].tolist()
        assert prompt in envs.task.prompts["train"]
        assert prompt + response == envs.tokenizer.decode(chosen, skip_special_tokens=True)
    for same in (episodes[:], episodes.trimmed(), episodes.to("cpu"), type(episodes).concatenate([episodes])):
        assert same.texts() == episodes.texts(envs.tokenizer)
    with pytest.raises(InvalidArgumentError, match="`tokenizer` must be given"):
        replace(episodes).texts()


# -- one line each ---------------------------------------------------------------------------------------------------


def test_objects_are_said_in_a_line() -> None:
    envs: Any = gym.make_vec(ID, num_envs=4, task=TINY.task, split="train")
    envs.reset(seed=0)
    found = evaluate(CausalPolicy(TINY.lm), envs, samples=2)
    optimum = solve(TINY.task, split="train")
    lines = {
        repr(TINY.task): "Task('tiny': prompts 3 train; max_new_tokens=3, kl_coef=0.4, gamma=1)",
        repr(found.episodes): "Episodes(6 of ",
        repr(found): "Evaluation(return ",
        repr(optimum): f"Optimum(V* = {optimum.value:.4f}, J_ref {optimum.reference:.4f}, by tree)",
        repr(make_task("reviews").optima["test"]): "StoredOptimum(V* 1.07",
        repr(Interval(0.5, 0.25, 0.75)): "0.5 [0.25, 0.75]",
        repr(Interval.point(0.5)): "0.5 exact",
    }
    for line, start in lines.items():
        assert line.startswith(start)
        assert "\n" not in line
        assert len(line) < 300


def test_the_suite_is_a_list_that_prints_as_a_table() -> None:
    suite = lmgym.suite()
    assert isinstance(suite, list)
    header, *rows = repr(suite).splitlines()
    assert header.split()[:3] == ["task", "T", "prompts"]
    assert [row.split()[0] for row in rows] == [task.name for task in suite]
    row = next(row for row in rows if row.startswith("keyword-8 "))
    assert f"= {make_task('keyword-8').optima['test'].value:.4f}" in row
    row = next(row for row in rows if row.startswith("tldr "))  # of which nothing is downloaded
    assert row.endswith("not known")
    assert repr(Suite([TINY.task])).endswith("task.optimum()")


# -- the optimum of any task -----------------------------------------------------------------------------------------


def test_the_optimum_is_the_stored_one_where_there_is_one() -> None:
    task = make_task("proxy-25")
    assert task.optimum() is task.optima["test"]
    assert task.optimum("train") is task.optima["train"]


def test_the_optimum_of_an_own_task_is_solved() -> None:
    found = TINY.task.optimum("train")
    expected = [TINY.optimum(prompt)[0] for prompt in TINY.prompts]
    assert found.exact
    assert found.value == pytest.approx(np.mean(expected), abs=1e-4)
    moved = make_task("keyword-8", kl_coef=0.3)
    assert moved.optimum() == solve(moved).stored()
    with pytest.raises(UnknownNameError, match="`split` must be one of \\['train'\\], got 'test'"):
        TINY.task.optimum()


def test_the_optimum_of_a_large_task_is_bounded_from_below(letters: CausalLM) -> None:
    fields: dict[str, Any] = {"reward": table_reward, "prompts": {"test": ["a", "b"]}, "kl_coef": 0.5}
    task = Task(name="large", model=letters, max_new_tokens=6, **fields)
    found = task.optimum()
    assert (found.method, found.upper, found.value) == ("samples", None, found.lower)
    envs: Any = gym.make_vec(ID, task=task, split="test")
    drawn = evaluate(CausalPolicy(letters), envs, samples=128, generator=torch.Generator().manual_seed(0))
    assert drawn.bound is not None
    assert found.lower >= found.reference - 1e-9
    assert found.reference == pytest.approx(drawn.metrics["score"].mean, abs=0.15)
    assert found.lower == pytest.approx(drawn.bound.mean, abs=0.25)
    assert multi_sample_bound(torch.zeros(2, 4, dtype=torch.float64), 0.5).tolist() == [0.0, 0.0]
    with pytest.raises(InvalidArgumentError, match=r"The optimum of 'large' is not known.*`gamma` must be 1"):
        replace(task, gamma=0.9).optimum()
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        replace(task, kl_coef=0.0).optimum()


# -- watching --------------------------------------------------------------------------------------------------------


def test_the_colours_reach_the_least_likely_token() -> None:
    for few in ([], [-0.1, -6.9, -np.inf, np.nan]):
        assert scale_costs(0.2, np.array(few)) == pytest.approx(1.4)
    assert scale_costs(0.2, np.array([-7.1, -3.0])) == pytest.approx(2.8)
    assert scale_costs(0.2, np.array([-22.7])) == pytest.approx(5.6)


def test_a_random_agents_tokens_are_told_apart() -> None:
    env: Any = gym.make(ID, render_mode="ansi").unwrapped
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(8):
        env.step(env.action_space.sample())
    reds = [red for _, red in env._frame().spans if red is not None]
    assert len(set(reds)) == 8
    assert max(reds) <= 1


def frame(**changes: Any) -> Frame:
    values: dict[str, Any] = {"score": -0.5, "episode_return": -3.5, "finish_reason": "eos", **changes}
    return Frame(prompt="a", tokens=["b", "c"], costs=[-1.0, -2.0], max_new_tokens=4, **values)


def test_the_return_of_an_episode_is_explained_where_it_is_shown() -> None:
    line = "env return = score -0.500, and -3.000 for its tokens: kl_coef * log pi_ref of each."
    for text in (to_text(frame()), to_terminal(frame(), width=120)):
        assert line in text
    for unexplained in (frame(score=None, finish_reason=None), frame(episode_return=-3.0)):
        assert "env return =" not in to_text(unexplained)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_episodes_are_watched_at_the_env_s_own_pace() -> None:
    started = time.monotonic()
    shown_at = wait_for_turn(0.0, 20, Terminal())
    assert time.monotonic() - started < 0.02  # the first frame waits for none
    shown_at = wait_for_turn(shown_at, 20, Terminal())
    assert time.monotonic() - started >= 0.05
    started = time.monotonic()
    wait_for_turn(started, 1, io.StringIO())
    assert time.monotonic() - started < 0.5  # nobody watches a file
