"""The token MDP as a Gymnasium env: rewards rebuilt from raw Hugging Face models, ends, options, state, errors."""

from __future__ import annotations

import gc
import json
import math
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import WORDS, gpt2, word_tokenizer
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lmgym
from lmgym.errors import InvalidActionError, InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.models.lean.transformer import Transformer
from lmgym.models.ring import RingDecoder
from lmgym.tasks import Task
from lmgym.tasks.registry import registered_tasks

ID = "lmgym/RLHF-v0"
ON_HUB = {registered.env_id for registered in registered_tasks().values() if registered.on_hub}
IDS = sorted(name for name in gym.registry if name.startswith("lmgym/") and name not in ON_HUB)
EOS = 1
V = len(WORDS) + 3
P = 6
T = 8
KL_COEF = 0.2
Parts = dict[str, Any]


def make(parts: Parts, **changes: Any) -> gym.Env[Any, Any]:
    return gym.make(ID, **{**parts, **changes})


def random_tokens(rng: np.random.Generator, length: int = T, eos: float = 0.12) -> list[int]:
    """Actions of an agent that ends now and then."""
    return [EOS if rng.random() < eos else int(token) for token in rng.integers(2, V, length)]


def play(env: gym.Env[Any, Any], actions: list[int]) -> list[tuple[Any, ...]]:
    """Steps until the end, or until the actions run out."""
    steps: list[tuple[Any, ...]] = []
    for action in actions:
        steps.append(env.step(action))
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


class ByHand:
    """The reward of the design from raw Hugging Face parts, one sequence at a time."""

    def __init__(self, parts: Parts) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(parts["model"])
        self.tokenizer = AutoTokenizer.from_pretrained(parts["model"])
        self.reward = AutoModelForSequenceClassification.from_pretrained(parts["reward"])

    @torch.inference_mode()
    def log_probs(self, prompt: list[int], response: list[int]) -> list[float]:
        logits = self.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, :, : len(self.tokenizer)]
        log_pi = logits.double().log_softmax(-1)
        return [float(log_pi[len(prompt) + t - 1, token]) for t, token in enumerate(response)]

    @torch.inference_mode()
    def score(self, prompt: list[int], response: list[int]) -> float:
        return float(self.reward(input_ids=torch.tensor([[*prompt, *response]])).logits[0, 0])


@pytest.fixture(scope="module")
def by_hand(model_dir: str, reward_dir: str) -> ByHand:
    return ByHand({"model": model_dir, "reward": reward_dir})


def prompt_of(observation: dict[str, Any]) -> list[int]:
    ids: list[int] = observation["input_ids"][:P][observation["attention_mask"][:P] == 1].tolist()
    return ids


# --- conformance -----------------------------------------------------------------------------------------------------


def test_there_is_something_to_check() -> None:
    assert {ID, "lmgym/RLHFBandit-v0", "lmgym/Reviews-v0"} <= set(IDS)


@pytest.mark.parametrize("name", IDS)
def test_the_checkers_find_nothing_to_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(name, max_new_tokens=4).unwrapped
        check_env(env)
        sb3_check_env(env)


@pytest.mark.parametrize(
    "changes",
    [
        {"obs_format": "flat"},
        {"kl_coef": 0.0, "max_new_tokens": 1},
        {"dense_kl": False, "truncate": True},
        {"gamma": 0.9, "min_new_tokens": 3, "missing_eos_penalty": 1.0, "reward": "conftest:word_count"},
    ],
    ids=str,
)
def test_the_checkers_like_every_variant(parts: Parts, changes: Parts) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(parts, **changes).unwrapped
        check_env(env, skip_render_check=True)
        sb3_check_env(env)


@pytest.mark.parametrize("name", IDS)
def test_a_spec_survives_json(name: str, parts: Parts) -> None:
    gamma = 1.0 if name in ("lmgym/RLHFBandit-v0", "lmgym/RLHFText-v0") else 0.9  # an action is a whole response
    env = gym.make(name, **parts, gamma=gamma, obs_format="flat", prompt_order="sequential")
    assert env.spec is not None
    text = env.spec.to_json()
    json.loads(text)
    again = gym.make(EnvSpec.from_json(text))
    assert again.spec is not None
    assert again.spec.kwargs == env.spec.kwargs
    first = env.reset(seed=3)
    second = again.reset(seed=3)
    assert data_equivalence(first, second)
    env.action_space.seed(0)
    for _ in range(3):
        # Not every text is one that tokens can have.
        action = " the film" if name == "lmgym/RLHFText-v0" else env.action_space.sample()
        one = env.step(action)
        other = again.step(action)
        assert data_equivalence(one, other)
        if one[2] or one[3]:
            break


def test_the_module_form_needs_no_import() -> None:
    assert gym.make("lmgym:lmgym/Reviews-v0").unwrapped.task.name == "reviews"


def test_spaces_and_observations(parts: Parts, by_hand: ByHand) -> None:
    env = make(parts)
    assert env.action_space == gym.spaces.Discrete(V)  # not the padded embeddings of the model
    ids = env.observation_space["input_ids"]
    mask = env.observation_space["attention_mask"]  # type: ignore[index]
    assert (ids.shape, ids.dtype, ids.low.min(), ids.high.max()) == ((P + T,), np.int64, 0, V - 1)
    assert (mask.shape, mask.dtype) == ((P + T,), np.int8)
    prompt = by_hand.tokenizer("a book")["input_ids"]
    observation, info = env.reset(options={"prompt": "a book"})
    assert info.pop("prompt") == "a book"
    assert not any(info.values())
    response: list[int] = []
    while True:
        filled = P + len(response)
        assert observation["input_ids"][P - 2 : filled].tolist() == [*prompt, *response]
        assert observation["attention_mask"].tolist() == [0] * (P - 2) + [1] * (2 + len(response)) + [0] * (
            P + T - filled
        )
        assert (observation["input_ids"][observation["attention_mask"] == 0] == 0).all()
        assert env.observation_space.contains(observation)
        if len(response) == 4:
            break
        response.append(5 + len(response))
        observation = env.step(response[-1])[0]


def test_the_flat_format_is_the_same_with_holes(parts: Parts) -> None:
    env = make(parts)
    flat = make(parts, obs_format="flat")
    one = env.reset(seed=1)[0]
    other = flat.reset(seed=1)[0]
    for action in [3, 4, 5, EOS]:
        assert other.dtype == np.int64
        assert other.tolist() == np.where(one["attention_mask"] == 1, one["input_ids"], -1).tolist()
        assert flat.observation_space.contains(other)
        one, *rest = env.step(action)
        other, *flat_rest = flat.step(action)
        assert data_equivalence(rest, flat_rest)


def test_observations_are_copies(parts: Parts) -> None:
    env = make(parts)
    first, _ = env.reset(seed=0)
    before = {name: array.copy() for name, array in first.items()}
    second = env.step(5)[0]
    assert data_equivalence(first, before)
    second["input_ids"][:] = 7
    assert not (env.step(5)[0]["input_ids"] == 7).all()


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_are_those_rebuilt_by_hand(parts: Parts, by_hand: ByHand) -> None:
    env = make(parts)
    rng = np.random.default_rng(0)
    reasons = []
    for episode in range(50):
        observation, _ = env.reset(seed=0 if episode == 0 else None)
        prompt = prompt_of(observation)
        steps = play(env, random_tokens(rng))
        observation, *_, info = steps[-1]
        response = observation["input_ids"][P:][observation["attention_mask"][P:] == 1].tolist()
        assert len(response) == len(steps)
        expected = np.array([KL_COEF * x for x in by_hand.log_probs(prompt, response)])
        np.testing.assert_allclose([s[4]["ref_log_prob"] for s in steps], expected / KL_COEF, rtol=0, atol=1e-5)
        score = by_hand.score(prompt, response)
        assert info["score"] == pytest.approx(score, abs=1e-5)
        expected[-1] += score
        np.testing.assert_allclose([s[1] for s in steps], expected, rtol=0, atol=1e-5)
        assert info["discounted_return"] == pytest.approx(expected.sum(), abs=1e-5)
        assert info["prompt"] == by_hand.tokenizer.decode(prompt)
        assert info["prompt"] + info["response"] == by_hand.tokenizer.decode(
            [*prompt, *response], skip_special_tokens=True
        )
        assert [s[2] for s in steps] == [False] * (len(steps) - 1) + [True]
        assert not any(s[3] for s in steps)
        assert info["finish_reason"] == ("eos" if response[-1] == EOS else "length")
        reasons.append(info["finish_reason"])
    assert set(reasons) == {"eos", "length"}


@pytest.mark.parametrize(
    "changes", [{}, {"dense_kl": False}, {"missing_eos_penalty": 0.7}, {"kl_coef": 0.0}, {"gamma": 0.5}], ids=str
)
def test_the_info_rebuilds_the_reward(parts: Parts, changes: Parts) -> None:
    env = make(parts, **changes)
    rng = np.random.default_rng(1)
    for _ in range(6):
        first = env.reset(seed=2)[1]
        steps = play(env, random_tokens(rng))
        numbers = {"score", "discounted_return"} | (set() if "kl_coef" in changes else {"ref_log_prob"})
        for info in (first, *(step[4] for step in steps)):
            assert info.keys() == numbers | {"finish_reason", "prompt", "response"}
            assert {type(info[name]) for name in numbers} == {np.float64}
        for _, reward, *_, info in steps:
            paid = env.unwrapped.kl_coef * info.get("ref_log_prob", 0.0) + info["score"]
            assert reward == pytest.approx(paid, abs=1e-12)
            assert type(reward) is float
        discounted = sum(env.unwrapped.gamma**t * s[1] for t, s in enumerate(steps))
        assert steps[-1][4]["discounted_return"] == pytest.approx(discounted, abs=1e-12)


def test_the_gold_score_is_on_the_side(parts: Parts) -> None:
    def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [100.0 + len((p + c).split()) for p, c in zip(prompts, completions, strict=True)]

    task = Task(
        name="tiny", model=parts["model"], reward=parts["reward"], prompts={"train": ["a film"]}, kl_coef=KL_COEF,
        max_new_tokens=T, gold=gold,
    )  # fmt: skip
    plain = make(parts, prompts=["a film"])
    graded = gym.make(ID, task=task)
    rewards = []
    for env in (plain, graded):
        env.reset(seed=0)
        rewards.append([s[1] for s in play(env, [5, 6, EOS])])
    assert rewards[0] == rewards[1]
    graded.reset()
    info = play(graded, [5, 6, EOS])[-1][4]
    assert info["gold_score"] == 104.0
    assert "gold_score" not in play_from_start(plain, [5, EOS])[-1][4]


def play_from_start(env: gym.Env[Any, Any], actions: list[int], **options: Any) -> list[tuple[Any, ...]]:
    env.reset(seed=0, options=options)
    return play(env, actions)


def test_dense_or_not_the_return_is_one(parts: Parts) -> None:
    dense = make(parts)
    late = make(parts, dense_kl=False)
    rng = np.random.default_rng(3)
    for options in ({}, {}, {"response_ids": [5, 6]}, {"response_ids": [7]}):
        actions = random_tokens(rng, T - len(options.get("response_ids", [])))
        one, other = (play_from_start(env, actions, **options) for env in (dense, late))
        assert [s[1] for s in other[:-1]] == [0.0] * (len(other) - 1)
        assert sum(s[1] for s in other) == pytest.approx(sum(s[1] for s in one), abs=1e-5)
        if options:  # a clone remembers what came with the reset
            late.reset(seed=0, options=options)
            late.unwrapped.restore_state(late.unwrapped.clone_state())
            assert sum(s[1] for s in play(late, actions)) == pytest.approx(sum(s[1] for s in one), abs=1e-5)
        total = sum(s[4]["ref_log_prob"] for s in one)
        assert other[-1][4]["ref_log_prob"] == pytest.approx(total, abs=1e-5)
        assert total < -1


def refuse_to_run(env: gym.Env[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference ran")

    model = env.unwrapped._engine.lm.model
    for module in (model, model.base_model):
        monkeypatch.setattr(module, "forward", forward)
    monkeypatch.setattr(Transformer, "run", forward)


def test_without_a_price_the_reference_never_runs(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    priced = make(parts)
    free = make(parts, kl_coef=0.0)
    expected = play_from_start(priced, [5, 6, EOS])
    refuse_to_run(free, monkeypatch)
    steps = play_from_start(free, [5, 6, EOS])
    assert [s[1] for s in steps] == [0.0, 0.0, expected[-1][4]["score"]]
    assert all("ref_log_prob" not in s[4] for s in steps)
    with pytest.raises(AssertionError, match="the reference ran"):
        play_from_start(priced, [5])  # the trap works


def test_the_last_token_costs_no_forward(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is read when the next reward needs it, so the last one of an episode never is."""
    reads: list[str] = []
    for name in ("step", "prefill"):
        method = getattr(RingDecoder, name)
        monkeypatch.setattr(RingDecoder, name, lambda *a, m=method, n=name: reads.append(n) or m(*a))
    env = make(parts)
    reads.clear()  # of the probe
    env.reset(seed=0)
    play(env, [5, 6, EOS])
    assert reads == ["prefill", "step", "step"]
    env.reset()
    env.reset()
    env.step(EOS)
    assert reads[3:] == ["prefill"]


# --- ends ------------------------------------------------------------------------------------------------------------


def test_truncate_reports_the_length_limit_as_truncation_alone(parts: Parts) -> None:
    env = make(parts, truncate=True)
    plain = make(parts)
    for actions in ([5] * T, [5, EOS], [5] * (T - 1) + [EOS]):
        one = play_from_start(plain, actions)
        other = play_from_start(env, actions)
        limit = actions[-1] != EOS
        assert [(s[2], s[3]) for s in other] == [(False, False)] * (len(actions) - 1) + [(not limit, limit)]
        assert [(s[2], s[3]) for s in one] == [(False, False)] * (len(actions) - 1) + [(True, False)]
        assert [s[1] for s in one] == [s[1] for s in other]
        assert other[-1][4]["finish_reason"] == ("length" if limit else "eos")


def test_an_early_eos_is_a_token_like_the_rest(parts: Parts, by_hand: ByHand) -> None:
    env = make(parts, min_new_tokens=3)
    steps = play_from_start(env, [EOS, 5, EOS, EOS], prompt="a film")
    assert len(steps) == 4
    assert [s[2] for s in steps] == [False, False, False, True]
    prompt = by_hand.tokenizer("a film")["input_ids"]
    log_probs = by_hand.log_probs(prompt, [EOS, 5, EOS, EOS])
    np.testing.assert_allclose([s[4]["ref_log_prob"] for s in steps], log_probs, rtol=0, atol=1e-5)
    assert len(play_from_start(env, [5, 5, 5, EOS])) == 4
    assert play_from_start(env, [EOS] * T)[-1][4]["finish_reason"] == "eos"


def test_a_missing_eos_is_fined_in_the_score(parts: Parts) -> None:
    env = make(parts, missing_eos_penalty=2.5)
    plain = make(parts)
    for actions, fine in (([5] * T, 2.5), ([5, EOS], 0.0), ([5] * (T - 1) + [EOS], 0.0)):
        one = play_from_start(plain, actions)
        other = play_from_start(env, actions)
        assert other[-1][4]["score"] == pytest.approx(one[-1][4]["score"] - fine, abs=1e-12)
        assert other[-1][1] == pytest.approx(one[-1][1] - fine, abs=1e-12)
        assert [s[1] for s in other[:-1]] == [s[1] for s in one[:-1]]


def test_a_discount_changes_what_is_reported_not_what_is_paid(parts: Parts) -> None:
    env = make(parts, gamma=0.8)
    plain = make(parts)
    one, other = (play_from_start(e, [5, 6, 7, EOS]) for e in (plain, env))
    assert env.unwrapped.gamma == 0.8
    assert [s[1] for s in one] == [s[1] for s in other]
    expected = sum(0.8**t * s[1] for t, s in enumerate(other))
    assert other[-1][4]["discounted_return"] == pytest.approx(expected, abs=1e-12)


def test_steps_outside_an_episode_are_refused(parts: Parts) -> None:
    for env in (make(parts), make(parts).unwrapped):
        for call in (lambda env=env: env.step(5), lambda env=env: env.unwrapped.clone_state()):
            with pytest.raises(ResetNeeded):
                call()
        play_from_start(env, [EOS])
        with pytest.raises(ResetNeeded):
            env.step(5)
        env.reset()
        env.step(5)


@pytest.mark.parametrize(
    "action", [-1, V, V + 2, 10**9, 5.0, "a", None, True, [5], np.array([5]), np.float32(5)], ids=repr
)
def test_what_is_no_token_is_refused_and_changes_nothing(parts: Parts, action: Any) -> None:
    env = make(parts).unwrapped
    env.reset(seed=0)
    env.step(5)
    before = env.clone_state()
    with pytest.raises(InvalidActionError, match="`action` must be "):
        env.step(action)
    after = env.clone_state()
    assert (after.response_ids, after.returns) == (before.response_ids, before.returns)
    env.step(6)


def test_tokens_of_any_integer_kind_are_taken(parts: Parts) -> None:
    env = make(parts).unwrapped
    paid = []
    for action in (5, np.int64(5), np.int32(5), np.array(5), torch.tensor(5)):
        env.reset(seed=0)
        paid.append(env.step(action)[1])
    assert len(set(paid)) == 1


# --- seeds and copies ------------------------------------------------------------------------------------------------


def trace(env: gym.Env[Any, Any], seed: int | None, episodes: int = 3) -> list[Any]:
    """Everything that an env says over some episodes."""
    rng = np.random.default_rng(4)
    said = []
    for episode in range(episodes):
        said.append(env.reset(seed=seed if episode == 0 else None))
        said += play(env, random_tokens(rng))
    return said


def test_one_seed_one_history_whatever_other_envs_do(parts: Parts) -> None:
    expected = trace(make(parts), 7)
    first = make(parts)
    second = make(parts)
    third = make(parts)
    third.reset(seed=8)
    rng = np.random.default_rng(4)
    said: list[list[Any]] = [[], []]
    for episode in range(3):
        seed = 7 if episode == 0 else None
        for env, log in zip((first, second), said, strict=True):
            log.append(env.reset(seed=seed))
        for action in random_tokens(rng):
            third.reset()
            third.step(5)
            steps = [env.step(action) for env in (first, second)]
            for log, step in zip(said, steps, strict=True):
                log.append(step)
            if steps[0][2]:
                break
    assert data_equivalence(said[0], expected)
    assert data_equivalence(said[1], expected)
    assert not data_equivalence(trace(make(parts), 8), expected)
    for env in (first, third):  # a seed starts everything anew, the stream of prompts too
        again = trace(env, 7)
        assert data_equivalence([step[0] for step in again], [step[0] for step in expected])


def test_global_generators_are_left_alone(parts: Parts) -> None:
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002
    position = np.random.get_state()[2]  # noqa: NPY002
    torch_state = torch.get_rng_state()
    trace(make(parts), 0)
    assert (np.random.get_state()[1] == numbers).all()  # noqa: NPY002
    assert np.random.get_state()[2] == position  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_prompts_are_dealt_without_replacement(parts: Parts) -> None:
    env = make(parts)
    texts = [tuple(prompt_of(env.reset(seed=5 if i == 0 else None)[0])) for i in range(18)]
    epochs = [texts[i : i + 6] for i in (0, 6, 12)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert not (epochs[0] == epochs[1] == epochs[2])
    in_order = make(parts, prompt_order="sequential")
    texts = [tuple(prompt_of(in_order.reset(seed=5 if i == 0 else None)[0])) for i in range(12)]
    assert texts[:6] == texts[6:]
    by_index = [tuple(prompt_of(in_order.reset(options={"prompt_index": i})[0])) for i in range(6)]
    assert texts[:6] == by_index


@pytest.mark.parametrize("changes", [{}, {"dense_kl": False}, {"gamma": 0.9}, {"kl_coef": 0.0}], ids=str)
@pytest.mark.parametrize("steps", [0, 3, T])
def test_a_pickled_env_goes_on_as_the_first_would_have(parts: Parts, changes: Parts, steps: int) -> None:
    env = make(parts, **changes)
    rng = np.random.default_rng(5)
    trace(env, 3, episodes=2)
    env.reset()
    play(env, random_tokens(rng, steps, eos=0.0))
    copy = pickle.loads(pickle.dumps(env))
    assert copy.spec == env.spec
    if steps == T:
        with pytest.raises(ResetNeeded):
            copy.step(5)
    else:
        assert_like(play(copy, [5] * T), play(env, [5] * T))
    for _ in range(8):  # past the end of an epoch of prompts
        assert data_equivalence(copy.reset(), env.reset())
    assert_like(play(copy, [7, 8, EOS]), play(env, [7, 8, EOS]))


def assert_like(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    """Steps that are the same to round-off: a copy reads its past in one pass, not token by token."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert data_equivalence(one[0], other[0])
        assert one[1] == pytest.approx(other[1], abs=1e-5)
        assert one[2:4] == other[2:4]
        assert list(one[4]) == list(other[4])
        for key, value in other[4].items():
            assert one[4][key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-5))


def test_a_fresh_env_can_be_pickled(parts: Parts) -> None:
    env = pickle.loads(pickle.dumps(make(parts)))
    with pytest.raises(ResetNeeded):
        env.unwrapped.clone_state()
    assert data_equivalence(trace(env, 1), trace(make(parts), 1))


@pytest.mark.parametrize("changes", [{}, {"dense_kl": False}, {"gamma": 0.9, "missing_eos_penalty": 1.0}], ids=str)
def test_planning_from_a_cloned_state_is_exact(parts: Parts, changes: Parts) -> None:
    env = make(parts, **changes)
    other = make(parts, **changes)
    env.reset(seed=6)
    play(env, [5, 6])
    state = env.unwrapped.clone_state()
    plans = ([7, 8, EOS], [9] * 6, [EOS], [7, 8, EOS])
    found = []
    there = env.unwrapped.restore_state(state)
    for plan in plans:
        assert data_equivalence(env.unwrapped.restore_state(state), there)
        found.append(play(env, plan))
    assert_like(found[3], found[0])
    for plan, steps in zip(plans, found, strict=True):  # against an env that was never interrupted
        env.reset(seed=6)
        assert_like(steps, play(env, [5, 6, *plan])[2:])
    other.reset(seed=99)
    play(other, [3, 3, 3])
    other.unwrapped.restore_state(state)
    assert_like(play(other, plans[0]), found[0])


def test_the_references_distribution_is_what_the_next_step_is_paid_by(parts: Parts) -> None:
    env = make(parts, kl_coef=0.5)
    with pytest.raises(ResetNeeded):
        env.unwrapped.reference_log_probs()
    env.reset(seed=6)
    for token in (5, 7, 3):
        log_pi = env.unwrapped.reference_log_probs()
        assert log_pi.shape == (env.action_space.n,)
        assert np.exp(log_pi).sum() == pytest.approx(1, abs=1e-5)
        assert env.step(token)[4]["ref_log_prob"] == pytest.approx(log_pi[token], abs=1e-5)


def test_the_end_of_an_episode_is_a_state_too(parts: Parts) -> None:
    env = make(parts, render_mode="ansi")
    env.reset(seed=6)
    play(env, [5, EOS])
    shown = env.render()
    end = env.unwrapped.clone_state()
    env.reset()
    play(env, [7])
    middle = env.unwrapped.clone_state()
    env.unwrapped.restore_state(end)
    with pytest.raises(ResetNeeded):
        env.step(5)
    assert env.render() == shown
    env.unwrapped.restore_state(middle)
    env.step(5)
    with pytest.raises(InvalidArgumentError, match="`state` must come from `clone_state`, got 3."):
        env.unwrapped.restore_state(3)


# --- reset options ---------------------------------------------------------------------------------------------------


def test_a_prompt_may_come_as_text_ids_or_index(parts: Parts, by_hand: ByHand) -> None:
    env = make(parts)
    text = "the meal is not"
    ids = by_hand.tokenizer(text)["input_ids"]
    seen = [env.reset(options=o)[0] for o in ({"prompt": text}, {"prompt_ids": ids}, {"prompt_index": 4})]
    seen += [env.reset(options=o)[0] for o in ({"prompt_ids": np.array(ids)}, {"prompt_index": np.int64(4)})]
    assert all(data_equivalence(o, seen[0]) for o in seen)
    assert prompt_of(seen[0]) == ids
    assert play_from_start(env, [EOS], prompt="dull , dull")[-1][4]["prompt"] == "dull , dull"  # none of the split's


def test_options_do_not_use_up_the_prompts_of_the_stream(parts: Parts) -> None:
    env = make(parts)
    other = make(parts)
    first = env.reset(seed=1)[0]
    second = other.reset(seed=1)[0]
    for _ in range(8):
        assert data_equivalence(first, second)
        other.reset(options={"prompt_index": 0})
        other.step(5)
        first = env.reset(options={})[0]
        second = other.reset(options=None)[0]


def test_a_response_may_begin_in_mid_air(parts: Parts, by_hand: ByHand) -> None:
    env = make(parts)
    prompt = by_hand.tokenizer("a film")["input_ids"]
    whole = play_from_start(env, [5, 6, 7, EOS], prompt="a film")
    observation, _ = env.reset(options={"prompt": "a film", "response_ids": [5, 6]})
    assert data_equivalence(observation, whole[1][0])
    rest = play(env, [7, EOS])
    for one, other in zip(rest, whole[2:], strict=True):
        assert data_equivalence(one[0], other[0])
        assert one[1] == pytest.approx(other[1], abs=1e-5)
    assert rest[-1][4]["score"] == pytest.approx(by_hand.score(prompt, [5, 6, 7, EOS]), abs=1e-5)
    assert rest[-1][4]["discounted_return"] == pytest.approx(sum(s[1] for s in rest), abs=1e-9)
    env.reset(options={"response_ids": np.array([5] * (T - 1))})
    assert env.step(5)[2]


def test_an_early_eos_may_stand_in_a_prefix(parts: Parts) -> None:
    env = make(parts, min_new_tokens=2)
    env.reset(options={"response_ids": [EOS, EOS]})
    assert env.step(EOS)[2]
    with pytest.raises(InvalidArgumentError, match="`response_ids` must not end the episode, and token 2 is an EOS."):
        env.reset(options={"response_ids": [5, EOS, EOS]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt": "a"}, r"`options` must be one of .*, got 'promt'. Did you mean 'prompt'\?"),
        ({"prompt": "a", "prompt_index": 0}, r"must have at most one of .*, got \['prompt', 'prompt_index'\]."),
        ({"prompt": " "}, "`prompt` must be a non-empty text, got ' '."),
        ({"prompt": 3}, "`prompt` must be a non-empty text, got 3."),
        ({"prompt": "a " * 7}, "`prompt` must have 1 to 6 tokens, got 7."),
        ({"prompt_ids": []}, "`prompt_ids` must have 1 to 6 tokens, got 0."),
        ({"prompt_ids": [3] * 7}, "`prompt_ids` must have 1 to 6 tokens, got 7."),
        ({"prompt_ids": [3, V]}, f"`prompt_ids` must hold token ids of the tokenizer, got {V}."),
        ({"prompt_ids": [-1]}, "`prompt_ids` must hold token ids of the tokenizer, got -1."),
        ({"prompt_index": 6}, "`prompt_index` must be an int from 0 to 5, got 6."),
        ({"prompt_index": -1}, "`prompt_index` must be an int from 0 to 5, got -1."),
        ({"prompt_index": 1.0}, "`prompt_index` must be an int from 0 to 5, got 1.0."),
        ({"response_ids": [5] * T}, "`response_ids` must be shorter than 8 tokens, got 8."),
        ({"response_ids": [5, EOS]}, "`response_ids` must not end the episode, and token 1 is an EOS."),
        ({"response_ids": [V]}, f"`response_ids` must hold token ids of the tokenizer, got {V}."),
    ],
)
def test_bad_options_are_refused_and_change_nothing(parts: Parts, options: Parts, message: str) -> None:
    env = make(parts)
    env.reset(seed=0)
    env.step(5)
    with pytest.raises((InvalidArgumentError, UnknownNameError), match=message):
        env.reset(options=options)
    assert env.step(6)[0]["attention_mask"][P:].sum() == 2


# --- rendering -------------------------------------------------------------------------------------------------------


def test_text_and_pictures(parts: Parts) -> None:
    ansi = make(parts, render_mode="ansi")
    picture = make(parts, render_mode="rgb_array")
    for env in (ansi.unwrapped, picture.unwrapped):
        with pytest.raises(ResetNeeded):
            env.render()
    for env in (ansi, picture):
        env.reset(options={"prompt": "a film"})
    sizes = set()
    for action in ([], [5], [6], [EOS]):
        play(ansi, action)
        play(picture, action)
        text = ansi.render()
        image = picture.render()
        assert text.startswith("prompt: a film\nresponse: ")
        assert image.dtype == np.uint8
        sizes.add(image.shape)
    assert len(sizes) == 1
    assert re.search(r"response: +film book <eos>\nstep: 3/8 +env return: -\d", text)
    assert "(eos)" in text
    assert f"score: {play_from_start(ansi, [5, 6, EOS], prompt='a film')[-1][4]['score']:+.3f}" in text


def test_the_return_on_display_is_the_sum_of_the_rewards(parts: Parts) -> None:
    env = make(parts, render_mode="ansi", gamma=0.5)
    steps = play_from_start(env, [5, 6, 7])
    assert f"return: {sum(s[1] for s in steps):+.3f}" in env.render()


def test_human_mode_prints(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    env = make(parts, render_mode="human")
    play_from_start(env, [5, 6, EOS], prompt="a film")
    assert "prompt: a film\nresponse: film book" in capsys.readouterr().out.replace("response:  ", "response: ")
    assert env.render() is None


def test_rendering_without_a_mode_warns(parts: Parts) -> None:
    env = make(parts).unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match=r"render_mode='ansi'"):
        assert env.render() is None


# --- arguments -------------------------------------------------------------------------------------------------------

BAD: list[tuple[Parts, str]] = [
    ({"max_tokens": 3}, r"got 'max_tokens'. Did you mean 'max_new_tokens'\?"),
    ({"klcoef": 3}, r"got 'klcoef'. Did you mean 'kl_coef'\?"),
    ({"task": "revews"}, r"`task` must be one of .*, got 'revews'. Did you mean 'reviews'\?"),
    ({"task": 3}, "`task` must be a name or a lmgym.tasks.Task, got 3."),
    ({"split": "trian"}, r"`split` must be one of \['test', 'train'\], got 'trian'. Did you mean 'train'\?"),
    ({"kl_coef": -0.1}, "`kl_coef` must be a finite number >= 0, got -0.1."),
    ({"kl_coef": "0.2"}, "`kl_coef` must be a finite number >= 0, got '0.2'."),
    ({"kl_coef": math.nan}, "`kl_coef` must be a finite number >= 0, got nan."),
    ({"gamma": 1.1}, "`gamma` must be a finite number >= 0 and <= 1, got 1.1."),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be an int >= 1, got 0."),
    ({"max_new_tokens": 2.0}, "`max_new_tokens` must be an int >= 1, got 2.0."),
    ({"min_new_tokens": 8}, "`min_new_tokens` must be an int >= 0 and <= 7, got 8."),
    ({"missing_eos_penalty": -1}, "`missing_eos_penalty` must be a finite number >= 0, got -1."),
    ({"dense_kl": 1}, "`dense_kl` must be True or False, got 1."),
    ({"truncate": "no"}, "`truncate` must be True or False, got 'no'."),
    ({"obs_format": "flatt"}, r"`obs_format` must be one of .*, got 'flatt'. Did you mean 'flat'\?"),
    ({"prompt_order": "random"}, "`prompt_order` must be one of .*, got 'random'."),
    ({"device": 0}, "`device` must be 'auto' or the name of a torch device, got 0."),
    ({"device": "gpu"}, "`device` must be 'auto' or a torch device such as 'cpu', got 'gpu'."),
    ({"dtype": "float"}, "`dtype` must be one of .*, got 'float'."),
    ({"model": "/no/such/place"}, "`model` must be a local directory or a hub name, and there is no '/no/such/place'."),
    ({"model": 3}, "`model` must be a local directory or a hub name, got 3."),
    ({"reward": "/no/such/place"}, "`reward` must be a local directory or a hub name"),
    ({"reward": "module:"}, "`reward` must be an import path 'package.module:function', got 'module:'."),
    ({"reward": "no_such_module:reward"}, "No module named 'no_such_module'"),
    ({"reward": 3}, "`reward` must be"),
    ({"prompts": []}, r"`prompts` must be a non-empty list of texts or rows, got \[\]."),
    ({"prompts": ["a", ""]}, "`prompts` must hold non-empty texts, and item 1 is ''."),
    ({"prompts": 3}, "`prompts` must be a non-empty list of texts or rows, got 3."),
    ({"prompts": "/no/such/file.txt"}, "there is no file '/no/such/file.txt'."),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[str(bad) for bad, _ in BAD])
@pytest.mark.parametrize("maker", [gym.make, gym.make_vec], ids=["make", "make_vec"])
def test_bad_arguments_fail_before_any_model_loads(
    parts: Parts,
    bad: Parts,
    message: str,
    maker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "from_pretrained", load)
    # Copies, for the tiny models themselves are held in the shared cache and would not be loaded again.
    own = {name: str(shutil.copytree(parts[name], tmp_path / name)) for name in ("model", "reward")}
    with pytest.raises(LmGymError, match=message):
        maker(ID, **{**parts, **own, **bad})
    with pytest.raises(LmGymError, match="a model was loaded"):
        maker(ID, **{**parts, **own})


def test_an_unknown_render_mode_is_refused(parts: Parts) -> None:
    with pytest.raises(LmGymError, match=r"`render_mode` must be one of .*, got 'ascii'."), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium has a word of its own to say
        make(parts, render_mode="ascii")


def test_a_horizon_beyond_the_models_positions_is_refused(parts: Parts) -> None:
    with pytest.raises(
        InvalidArgumentError, match="has 6 .* model has 48 positions: lower `max_new_tokens` to 42 or less"
    ):
        make(parts, max_new_tokens=43)
    env = make(parts, max_new_tokens=42)
    env.reset(options={"prompt": "a film , a book and"})
    assert len(play(env, [5] * 42)) == 42


@pytest.mark.parametrize("form", ["list", "txt", "jsonl of objects", "jsonl of strings"])
def test_prompts_from_a_list_or_a_file(parts: Parts, form: str, tmp_path: Path) -> None:
    texts = ["a film", "we liked the book", "it"]
    path = tmp_path / f"prompts.{form.split()[0]}"
    lines = {
        "txt": texts,
        "jsonl of objects": [json.dumps({"id": i, "prompt": text}) for i, text in enumerate(texts)],
        "jsonl of strings": [json.dumps(text) for text in texts],
    }
    if form != "list":
        path.write_text("\n".join(lines[form]) + "\n\n")
    env = make(parts, prompts=texts if form == "list" else str(path), prompt_order="sequential")
    found = []
    for _ in range(3):
        env.reset()
        found.append(play(env, [EOS])[-1][4]["prompt"])
    assert found == texts
    assert env.observation_space["input_ids"].shape == (4 + T,)  # type: ignore[index]


def test_envs_share_one_reference_and_one_reward_model(parts: Parts) -> None:
    one = make(parts).unwrapped
    other = make(parts, kl_coef=0.3, max_new_tokens=4).unwrapped
    assert one._engine.lm is other._engine.lm
    assert one._engine.reward.model is other._engine.reward.model
    assert one.spec is not None
    assert make(parts, model=one._engine.lm).unwrapped._engine.lm is one._engine.lm  # a live object


def test_a_live_model_moves_to_a_device_that_is_named(parts: Parts) -> None:
    lm = make(parts).unwrapped._engine.lm
    task = replace(lmgym.make_task("echo-2"), model=lm)
    assert task.reference() is lm
    assert task.reference("cpu") is lm
    moved = task.reference("meta")
    assert (moved.device.type, lm.device.type) == ("meta", "cpu")
    assert task.reference("meta") is moved
    assert task.reference("cpu", "bfloat16").dtype == torch.bfloat16
    assert task.reference("cpu", "bfloat16").model is not lm.model


def test_a_live_model_is_not_copied_by_the_wrappers(parts: Parts) -> None:
    lm = make(parts).unwrapped._engine.lm
    env = make(parts, model=lm)
    assert env.spec is not None
    assert env.spec.kwargs["model"] is lm


def test_bfloat16_rewards_within_their_rounding(parts: Parts) -> None:
    one = play_from_start(make(parts), [5, 6, 7, EOS])
    other = play_from_start(make(parts, dtype="bfloat16"), [5, 6, 7, EOS])
    gaps = [abs(a[4]["ref_log_prob"] - b[4]["ref_log_prob"]) for a, b in zip(one, other, strict=True)]
    assert 0 < max(gaps) < 0.3
    assert one[-1][4]["score"] == other[-1][4]["score"]  # the reward model stays in float32


@pytest.mark.gpu
def test_on_a_gpu_the_rewards_are_those_of_the_cpu(parts: Parts) -> None:
    one = play_from_start(make(parts, device="cpu"), [5, 6, 7, EOS])
    env = make(parts)
    assert env.unwrapped._engine.lm.device.type == "cuda"
    assert_like(play_from_start(env, [5, 6, 7, EOS]), one)


@pytest.mark.slow
def test_a_deep_model_of_many_tokens_and_a_reward_model_with_another_tokenizer(
    byte_reward_dir: str, tmp_path: Path
) -> None:
    """The smallest GPT-2 in all but its width, which would take half a gigabyte."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(50_254)])
    model = gpt2(50_257, scale=0.04, n_embd=192, n_layer=12, n_head=12, n_positions=1024)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    del model
    prompts = ["w1 w2 w50000", "w7"]
    env = gym.make(ID, model=str(tmp_path), reward=byte_reward_dir, prompts=prompts, max_new_tokens=6, kl_coef=0.1)
    assert env.action_space == gym.spaces.Discrete(50_257)
    raw = env.unwrapped._engine.lm.model
    scorer = AutoModelForSequenceClassification.from_pretrained(byte_reward_dir)
    letters = AutoTokenizer.from_pretrained(byte_reward_dir)
    rng = np.random.default_rng(0)
    for episode in range(3):
        observation, _ = env.reset(seed=0 if episode == 0 else None)
        prompt = observation["input_ids"][:3][observation["attention_mask"][:3] == 1].tolist()
        response = rng.integers(3, 50_257, 6).tolist()
        response = [*response[:3], EOS] if episode == 1 else response
        steps = play(env, response)
        with torch.inference_mode():
            log_pi = raw(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
            text = tokenizer.decode([*prompt, *response], skip_special_tokens=True)
            score = scorer(input_ids=torch.tensor([letters(text)["input_ids"]])).logits.item()
        expected = [0.1 * float(log_pi[len(prompt) + t - 1, token]) for t, token in enumerate(response)]
        expected[-1] += score
        np.testing.assert_allclose([s[1] for s in steps], expected, rtol=0, atol=1e-5)
    assert lmgym.__version__


# --- what stays in memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [gym.make, gym.make_vec], ids=["make", "make_vec"])
def test_nothing_is_left_of_an_env_that_was_closed(parts: Parts, maker: Callable[..., Any]) -> None:
    def live() -> int:
        for _ in range(5):
            env = maker(ID, **parts)
            env.reset(seed=0)
            env.step(env.action_space.sample())
            env.close()
        del env
        gc.collect()
        return len(gc.get_objects())

    keep = maker(ID, **parts)
    counts = [live() for _ in range(4)]
    assert counts[-1] - counts[1] < 10
    keep.close()
