"""One-hot observations: the whole state, where an embedding of a table is not; and ids that put wrappers inside."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import lmgym  # noqa: F401 - registers the environments
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.optimum import solve
from lmgym.tasks import make_task
from lmgym.wrappers import EmbeddingObservation, OneHotObservation, VectorEmbeddingObservation
from lmgym.wrappers import one_hot_observation as module

Parts = dict[str, Any]
LAYOUTS = {  # entries: T + 1, then what is read of the tokens
    "keyword-8": 9 + 17 + 3,
    "brackets-2": 9 + 6 + 12,
    "stop-4": 9 + 0 + 9,
    "echo-2": 3 + 4 * 9,  # every prompt has an automaton of its own
    "arithmetic-1": 4 + 7 * 13,  # no table
    "noise-1": 9 + 9 * 17,  # what each token pays is paid at the end
}


def env_id(task: str) -> str:
    return f"lmgym/{task.capitalize()}-v0"


@pytest.mark.parametrize("task", LAYOUTS)
def test_the_layout(task: str) -> None:
    env = OneHotObservation(gym.make(env_id(task), device="cpu"))
    assert env.observation_space == gym.spaces.Box(0, 1, (LAYOUTS[task],), np.float32)
    observation, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    ended = False
    steps = 0
    while not ended:
        assert env.observation_space.contains(observation)
        assert observation[: env.unwrapped.engine.horizon + 1].argmax() == steps
        observation, _, terminated, truncated, _ = env.step(int(rng.integers(1, env.action_space.n)))
        ended = terminated or truncated
        steps = steps + 1


@functools.cache
def transitions(task: str, horizon: int) -> dict[bytes, set[tuple[Any, ...]]]:
    """What follows every observation of a task, action by action: all rewards and next observations that were seen."""
    env = OneHotObservation(gym.make("lmgym/RLHF-v0", task=task, device="cpu", max_new_tokens=horizon))
    vocabulary = range(env.action_space.n)
    seen: dict[bytes, set[tuple[Any, ...]]] = {}
    for index, response in itertools.product(range(2), itertools.product(vocabulary, repeat=horizon)):
        observation, _ = env.reset(options={"prompt_index": index % len(env.unwrapped.engine.prompts)})
        for token in response:
            before = observation.tobytes()
            observation, reward, terminated, _, _ = env.step(token)
            seen.setdefault(before, set()).add((token, round(reward, 4), terminated, observation.tobytes()))
            if terminated:
                break
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("task", "horizon"), [("brackets-2", 3), ("stop-4", 3), ("vocabulary-8", 2)])
def test_what_follows_depends_on_the_observation_alone(task: str, horizon: int) -> None:
    """By enumeration; of an automaton's compressed state this is not a matter of course."""
    seen = transitions(task, horizon)
    for follows in seen.values():
        assert len({token for token, *_ in follows}) == len(follows)
    assert len(seen) >= horizon


def test_without_the_automaton_two_states_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees a state that is not whole."""
    monkeypatch.setattr(module._Encoding, "__call__", lambda self, tokens: tokens[:, -1:].astype(np.float32))
    seen = transitions.__wrapped__("brackets-2", 3)
    assert any(len({token for token, *_ in follows}) < len(follows) for follows in seen.values())


def test_an_embedding_of_a_table_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="take OneHotObservation"):
        EmbeddingObservation(gym.make("lmgym/Keyword-8-v0", device="cpu"))
    with pytest.raises(InvalidArgumentError, match="take OneHotObservation"):
        VectorEmbeddingObservation(gym.make_vec("lmgym/Keyword-8-v0", device="cpu"))
    EmbeddingObservation(gym.make("lmgym/Keyword-8-v0", device="cpu"), allow_partial=True)
    EmbeddingObservation(gym.make("lmgym/Arithmetic-1-v0", device="cpu"))


def test_a_vocabulary_that_is_too_large_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match="at most 100000 entries .* got 250005, .* take EmbeddingObservation"
    ):
        OneHotObservation(gym.make("lmgym/Vocabulary-50000-v0", device="cpu", dense_kl=False))


def test_other_observations_are_refused(parts: Parts) -> None:
    env = gym.make("lmgym/RLHF-v0", **parts)
    with pytest.raises(InvalidArgumentError, match="`env` must have the observations of lmgym"):
        OneHotObservation(OneHotObservation(env))
    flat = OneHotObservation(gym.make("lmgym/RLHF-v0", obs_format="flat", **parts))
    assert data_equivalence(flat.reset(seed=0), OneHotObservation(env).reset(seed=0))


# --- ids that put wrappers inside ------------------------------------------------------------------------------------


@pytest.mark.parametrize("obs_format", ["embedding", "onehot", "flat"])
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_keywords_put_the_wrappers_inside(parts: Parts, obs_format: str, top_k: int | None, mode: str) -> None:
    parts = {**parts, "obs_format": obs_format, "top_k": top_k}
    one = gym.make_vec("lmgym/RLHF-v0", num_envs=2, autoreset_mode=mode, **parts)
    other = SyncVectorEnv([lambda: gym.make("lmgym/RLHF-v0", **parts)] * 2, autoreset_mode=AutoresetMode(mode))
    assert (one.observation_space, one.action_space) == (other.observation_space, other.action_space)
    assert data_equivalence(one.reset(seed=0), other.reset(seed=0))
    for step in range(12):
        actions = np.full(2, step % 4)
        found = one.step(actions)
        expected = other.step(actions)
        assert data_equivalence(found, expected)
        if mode == "Disabled" and (ended := found[2] | found[3]).any():
            one.reset(options={"reset_mask": ended}), other.reset(options={"reset_mask": ended.copy()})


def test_a_spec_with_wrappers_inside_makes_the_same_env(parts: Parts) -> None:
    env = gym.make("lmgym/RLHF-v0", obs_format="onehot", top_k=4, **parts)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert str(again) == str(env)
    assert data_equivalence(again.reset(seed=1), env.reset(seed=1))


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_what_the_keywords_cannot_be(parts: Parts, make: Any) -> None:
    with pytest.raises(
        LmGymError, match="`obs_format` must be one of .*'onehot'.* got 'one_hot'. Did you mean 'onehot'?"
    ):
        make("lmgym/RLHF-v0", obs_format="one_hot", **parts)
    with pytest.raises(LmGymError, match="`k` must be an int"):
        make("lmgym/RLHF-v0", top_k=0, **parts)
    with pytest.raises(LmGymError, match="one token a step"):
        make("lmgym/RLHFBandit-v0", top_k=3, **parts)
    assert make("lmgym/RLHFBandit-v0", obs_format="onehot", **parts)


# --- what it is for --------------------------------------------------------------------------------------------------


def test_tabular_soft_q_iteration_on_observations_finds_the_optimum() -> None:
    """An agent that sees nothing but the vectors, all of whose transitions it has seen, has V* in its table."""
    horizon = 3
    beta = 0.1
    seen = transitions("brackets-2", horizon)
    values: dict[bytes, float] = {}

    def value(state: bytes) -> float:
        if state not in values:
            q = [reward + (0.0 if ended else value(after)) for _, reward, ended, after in seen[state]]
            values[state] = beta * float(np.logaddexp.reduce(np.array(q) / beta))
        return values[state]

    env = OneHotObservation(gym.make("lmgym/RLHF-v0", task="brackets-2", device="cpu", max_new_tokens=horizon))
    found = value(env.reset(seed=0)[0].tobytes())
    assert found == pytest.approx(solve(make_task("brackets-2", max_new_tokens=horizon)).value, abs=1e-3)
