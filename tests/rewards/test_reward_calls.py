"""Reward functions as other people write them: what they return, what they are given, and what they cannot break."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import gpt2, word_tokenizer

import lmgym  # noqa: F401
from lmgym.errors import InvalidArgumentError, LmGymError, RewardError
from lmgym.models.causal import CausalLM, freeze
from lmgym.rewards.base import remove_noise, score
from lmgym.rewards.combined import CombinedReward
from lmgym.rewards.noise import NoisyReward
from lmgym.rewards.probe import find_leaves
from lmgym.tasks import Task, make_task

PROMPTS = ["a", "b"]
COMPLETIONS = [" x", " y"]


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    tokenizer = word_tokenizer()
    return CausalLM(freeze(gpt2(len(tokenizer))), tokenizer)


def make(lm: CausalLM, reward: Any, **changes: Any) -> Any:
    fields = {"prompts": ["the film was", "a book"], "max_new_tokens": 2, "kl_coef": 0.0} | changes
    return gym.make("lmgym/RLHF-v0", model=lm, reward=reward, device="cpu", **fields)


def counted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(i) for i in range(len(prompts))]


# --- what may be returned


@pytest.mark.parametrize(
    "returned",
    [
        [torch.tensor(0.5), torch.tensor([1.5])],
        [torch.tensor(0.5, dtype=torch.bfloat16), np.float32(1.5)],
        torch.tensor([0.5, 1.5], requires_grad=True),
        torch.tensor([0.5, 1.5], dtype=torch.float16),
        np.array([0.5, 1.5]),
        (0.5, 1.5),
    ],
)
def test_scores_come_as_lists_arrays_and_tensors(returned: Any) -> None:
    assert score(lambda **_: returned, PROMPTS, COMPLETIONS) == [0.5, 1.5]


@pytest.mark.parametrize(
    "returned",
    [torch.zeros(2, device="meta"), [torch.zeros((), device="meta"), 0.0], [10**400, 0], [1e39, 0], {0.5: 1}],
)
def test_what_holds_no_usable_numbers_is_refused(returned: Any) -> None:
    with pytest.raises(RewardError, match="The reward function must return"):
        score(lambda **_: returned, PROMPTS, COMPLETIONS)


def test_async_functions_are_awaited_also_where_a_loop_runs() -> None:
    async def slow(prompts: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [2.0] * len(prompts)

    async def notebook() -> list[float]:
        return score(slow, PROMPTS, COMPLETIONS)

    assert score(slow, PROMPTS, COMPLETIONS) == [2.0, 2.0]
    assert asyncio.run(notebook()) == [2.0, 2.0]


def test_an_async_client_stays_usable_between_calls() -> None:
    loops = []

    async def client(prompts: list[str], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(prompts)

    score(client, PROMPTS, COMPLETIONS)
    score(client, PROMPTS, COMPLETIONS)
    assert loops[0] is loops[1]


# --- several at once


def test_a_list_of_rewards_is_their_weighted_sum_and_none_adds_nothing() -> None:
    def some(prompts: list[str], **_: Any) -> list[float | None]:
        return [None, 4.0]

    assert score(CombinedReward([counted, some]), PROMPTS, COMPLETIONS) == [0.0, 5.0]
    assert score(CombinedReward([counted, some], [2.0, -0.5]), PROMPTS, COMPLETIONS) == [0.0, 0.0]
    with pytest.raises(RewardError, match="At least one of the 1 rewards must apply .* prompt 'a'"):
        score(CombinedReward([some]), PROMPTS, COMPLETIONS)
    with pytest.raises(RewardError, match="returned None for completion ' x'. None, which says"):
        score(some, PROMPTS, COMPLETIONS)


def test_a_list_of_rewards_is_a_setting(lm: CausalLM) -> None:
    env = make(lm, [counted, "conftest:word_count"], reward_weights=[3, 10])
    env.reset(options={"prompt": "the film was"})
    env.step(5)
    assert env.step(5)[1] == pytest.approx(10 * 0.1 * 5)
    assert make_task(env.unwrapped.task, reward=counted).reward_weights is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": []}, "must be a reward or a non-empty list of them, got an empty list"),
        ({"reward_weights": [1.0]}, "`reward_weights` must be a list of 2 numbers, one a reward"),
        ({"reward_weights": [1.0, float("nan")]}, r"`reward_weights\[1\]` must be a finite number"),
        ({"reward_weights": 3}, "`reward_weights` must be a list of 2 numbers"),
        ({"reward": counted, "reward_weights": [1.0]}, "must be None where `reward` is no list"),
        ({"reward": [counted, 3]}, "`reward` must be"),
    ],
)
def test_lists_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"name": "t", "model": "m", "reward": [counted, counted], "prompts": {"train": ["a"]}} | changes
    with pytest.raises(InvalidArgumentError, match=message):
        Task(kl_coef=0.1, max_new_tokens=2, **fields)


def test_noise_in_a_part_is_reseeded_kept_and_taken_off() -> None:
    noisy = CombinedReward([NoisyReward(counted, 1.0), NoisyReward(counted, 1.0), counted], [1.0, 1.0, 1.0])
    noisy.reseed(3)
    parts = [score(part, PROMPTS, COMPLETIONS) for part in noisy.rewards]
    assert parts[0] != parts[1]  # streams of their own
    noisy.reseed(3)
    state = json.loads(json.dumps(noisy.get_state()))
    first = score(noisy, PROMPTS, COMPLETIONS)
    assert score(noisy, PROMPTS, COMPLETIONS) != first
    noisy.set_state(state)
    assert score(noisy, PROMPTS, COMPLETIONS) == first
    assert score(remove_noise(noisy), PROMPTS, COMPLETIONS) == [0.0, 3.0]
    assert list(find_leaves(noisy)) == [counted] * 3
    quiet = CombinedReward([counted])
    assert remove_noise(quiet) is quiet


# --- tried out when the env is made


def test_a_wrong_signature_is_explained_at_make(lm: CausalLM) -> None:
    def wrong(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    with pytest.raises(InvalidArgumentError, match="keywords prompts, completions, prompt_ids, completion_ids: wrong"):
        make(lm, wrong)
    for reward in ([counted, wrong], NoisyReward(wrong, 1.0)):  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="missing a required argument: 'answer'"):
            make(lm, reward)


@pytest.mark.parametrize("make_env", [gym.make, gym.make_vec])
def test_a_reward_that_raises_or_returns_nonsense_is_explained_at_make(lm: CausalLM, make_env: Any) -> None:
    def raises(completions: list[str], **_: Any) -> list[float]:
        return [float(c.split("=")[1]) for c in completions]

    fields = {"model": lm, "prompts": ["the film was"], "max_new_tokens": 2, "device": "cpu"}
    with pytest.raises(RewardError, match="raises was called once to try it out, and raised IndexError"):
        make_env("lmgym/RLHF-v0", reward=raises, **fields)
    with pytest.raises(RewardError, match="needs prompts that are conversations"):
        make_env("lmgym/RLHF-v0", reward=lambda completions, **_: [c[0]["content"] for c in completions], **fields)
    with pytest.raises(RewardError, match="must return 2 scores, one a completion, and returned 1"):
        make_env("lmgym/RLHF-v0", reward=lambda **_: [0.0], **fields)


def test_trying_out_leaves_what_is_random_where_it_stood(lm: CausalLM) -> None:
    class Random:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def __call__(self, prompts: list[str], **_: Any) -> list[float]:
            return self.rng.standard_normal(len(prompts)).tolist()

        def get_state(self) -> Any:
            return self.rng.bit_generator.state

        def set_state(self, state: Any) -> None:
            self.rng.bit_generator.state = state

    reward = Random()
    make(lm, reward)
    assert reward(["a"]) == Random()(["a"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("reseed", 3), ("reseed", lambda: None), ("get_state", {}), ("set_state", lambda: None), ("score_range", (0, 1))],
)
def test_attributes_of_names_that_mean_something_are_checked(name: str, value: Any) -> None:
    def reward(**_: Any) -> list[float]:
        return []

    setattr(reward, name, value)
    with pytest.raises(InvalidArgumentError, match=f"`reward.{name}` must be a method that the environment can call"):
        make_task("reviews", reward=reward)


def test_a_reseed_of_another_kind_and_an_endless_expected_are_named(lm: CausalLM) -> None:
    class Endless:
        def __call__(self, prompts: list[str], **_: Any) -> list[float]:
            return [0.0] * len(prompts)

        def reseed(self, seed: Any) -> None:
            seed.shuffle([])

    with pytest.raises(RewardError, match="`reward.reseed` must take an int seed, and raised AttributeError"):
        make(lm, Endless()).reset(seed=0)
    Endless.expected = property(lambda self: Endless())  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgumentError, match="`reward.expected` must lead to a reward without noise"):
        make(lm, Endless())


def test_a_path_is_a_directory(reward_dir: str) -> None:
    task = make_task("reviews", reward=Path(reward_dir))
    assert task.reward == reward_dir
    with pytest.raises(LmGymError, match="`reward`"):
        make_task("reviews", reward=Path("/no/such/dir")).reward_function("cpu")


# --- what a reward cannot break


def greedy_hands(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Empties and changes whatever it can reach."""
    size = len(completions)
    for values in (prompts, completions, *columns.values()):
        for value in values:
            if isinstance(value, list):
                value.clear()
            elif isinstance(value, dict):
                value["x"] = 1
        values.clear()
    return [0.0] * size


def test_a_reward_that_changes_its_arguments_changes_nothing(lm: CausalLM) -> None:
    rows = [{"prompt": "the film was", "tests": {"a": [1]}, "tags": ["b"]}]
    seen: list[Any] = []

    def gold(prompts: list[str], completions: list[str], completion_ids: Any, tests: Any, tags: Any, **_: Any) -> Any:
        seen.append((prompts, completions, completion_ids, tests, tags))
        return [1.0] * len(prompts)

    task = make_task("reviews", model=lm, prompts=rows, reward=greedy_hands, gold=gold, max_new_tokens=2, kl_coef=0.0)
    env = gym.make("lmgym/RLHF-v0", task=task, device="cpu")
    for _ in range(2):
        env.reset(seed=0)
        env.step(5)
        *_, info = env.step(6)
        assert info["prompt"] == "the film was"
        assert info["response"].split() == lm.tokenizer.convert_ids_to_tokens([5, 6])
        assert seen[-1][2:] == ([[5, 6]], [{"a": [1]}], [["b"]])


class Judge:
    """A reward that raises while it is away."""

    away = False

    def __call__(self, prompts: list[str], **_: Any) -> list[float]:
        if self.away:
            raise OSError("the judge is away")
        return [1.0] * len(prompts)


@pytest.mark.parametrize("env_id", ["lmgym/RLHF-v0", "lmgym/RLHFBandit-v0"])
def test_after_a_reward_raised_a_step_asks_for_a_reset(lm: CausalLM, env_id: str) -> None:
    reward = Judge()
    fields = {"model": lm, "reward": reward, "prompts": ["the film was"], "max_new_tokens": 1, "kl_coef": 0.0}
    env = gym.make(env_id, device="cpu", **fields)
    action = 5 if env_id.startswith("lmgym/RLHF-") else np.array([5])
    env.reset(seed=0)
    reward.away = True
    with pytest.raises(OSError, match="away"):
        env.step(action)
    reward.away = False
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    env.reset()
    assert env.step(action)[1] == 1.0


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_after_a_reward_raised_every_row_asks_for_a_reset(lm: CausalLM, mode: str) -> None:
    reward = Judge()
    fields = {"model": lm, "reward": reward, "prompts": ["the film was"], "max_new_tokens": 2}
    envs = gym.make_vec("lmgym/RLHF-v0", num_envs=2, autoreset_mode=mode, device="cpu", **fields)
    envs.reset(seed=0)
    reward.away = True
    with pytest.raises(OSError, match="away"):
        envs.step(np.array([1, 5]))  # row 0 ends, row 1 goes on
    reward.away = False
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.array([5, 5]))
    envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.array([5, 5]))
    envs.reset()
    envs.step(np.array([5, 5]))
    assert envs.step(np.array([5, 5]))[2].all()


def test_settings_of_the_process_are_put_back() -> None:
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), sys.stdout, np.geterr())

    def meddles(prompts: list[str], **_: Any) -> list[float]:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")
        np.seterr(all="raise")
        sys.stdout = io.StringIO()
        return [0.0] * len(prompts)

    score(meddles, PROMPTS, COMPLETIONS)
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), sys.stdout, np.geterr()) == before
    assert torch.zeros(1).device.type == "cpu"


def test_closing_the_program_s_stream_is_named() -> None:
    def closes(prompts: list[str], **_: Any) -> list[float]:
        sys.stdout.close()
        return [0.0] * len(prompts)

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), pytest.raises(RewardError, match="closed the program's own"):
        score(closes, PROMPTS, COMPLETIONS)
