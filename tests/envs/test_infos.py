"""What other libraries ask of an env's info, arguments and processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lmgym.envs.bandit import RLHFBanditVectorEnv
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidActionError, InvalidArgumentError, UnknownKeywordError, UnknownNameError
from lmgym.wrappers import (
    ActionMask,
    PolicyKL,
    TopKActions,
    VectorActionMask,
    VectorEmbeddingObservation,
    VectorPolicyKL,
    VectorTextObservation,
    VectorTopKActions,
)

ID = "lmgym/RLHF-v0"
EOS = 1
T = 8
N = 3
MODES = [mode.value for mode in AutoresetMode]
Parts = dict[str, Any]


def make_vec(parts: Parts, mode: str = "SameStep", **changes: Any) -> Any:
    return gym.make_vec(ID, num_envs=N, autoreset_mode=mode, **{**parts, **changes})


# --- infos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wrap"),
    [
        ({}, lambda env: env),
        ({"kl_coef": 0.0}, lambda env: env),
        ({"dense_kl": False}, lambda env: env),
        ({}, lambda env: TopKActions(env, 3)),
        ({}, lambda env: ActionMask(env, top_k=3)),
    ],
    ids=["plain", "no_kl", "kl_at_the_end", "top_k", "mask"],
)
def test_reset_and_every_step_have_the_same_keys_and_types(parts: Parts, config: Parts, wrap: Any) -> None:
    env = wrap(gym.make(ID, **{**parts, **config}))
    _, info = env.reset(seed=0)
    shape = {name: (type(value), np.shape(value)) for name, value in info.items()}
    for action in [2, 2, 1, 2, 2, 2, 2, 2]:
        _, _, terminated, _, info = env.step(action)
        assert {name: (type(value), np.shape(value)) for name, value in info.items()} == shape
        if terminated:
            _, info = env.reset()
            assert {name: (type(value), np.shape(value)) for name, value in info.items()} == shape


@pytest.mark.parametrize("mode", MODES)
def test_without_texts_every_entry_is_a_number(parts: Parts, mode: str) -> None:
    """And native and single envs still agree."""
    parts = {**parts, "text_info": False}
    one = make_vec(parts, mode)
    other = SyncVectorEnv([lambda: gym.make(ID, **parts)] * N, autoreset_mode=AutoresetMode(mode))
    found = one.reset(seed=0)
    expected = other.reset(seed=0)
    assert data_equivalence(found, expected)
    keys = found[1].keys()
    rng = np.random.default_rng(0)
    assert keys == {name for key in ("ref_log_prob", "score", "discounted_return") for name in (key, f"_{key}")}
    for _ in range(30):
        actions = rng.integers(1, 6, N)
        found = one.step(actions)
        expected = other.step(actions)
        assert data_equivalence(found, expected)
        infos = {name: x for name, x in found[4].items() if not name.endswith(("final_obs", "final_info"))}
        assert infos.keys() == keys
        assert all(infos[f"_{name}"].all() and infos[name].dtype == np.float64 for name in keys if name[0] != "_")
        ended = found[2] | found[3]
        if mode == "Disabled" and ended.any():
            one.reset(options={"reset_mask": ended}), other.reset(options={"reset_mask": ended.copy()})


def test_the_text_of_a_final_observation_needs_no_text_in_the_infos(parts: Parts) -> None:
    plain, bare = (VectorTextObservation(make_vec(parts, text_info=texts)) for texts in (True, False))
    plain.reset(seed=0), bare.reset(seed=0)
    for action in (5, EOS, 5):
        found = bare.step(np.full(N, action))
        expected = plain.step(np.full(N, action))
        assert found[0] == expected[0]
        assert data_equivalence(found[4].get("final_obs"), expected[4].get("final_obs"))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize("env_id", [ID, "lmgym/RLHFBandit-v0"])
def test_an_unknown_keyword_is_the_type_error_that_python_raises(make: Any, env_id: str) -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'frame_skip'") as caught:
        make(env_id, frame_skip=1)
    assert isinstance(caught.value, (UnknownKeywordError, UnknownNameError))
    with pytest.raises(UnknownNameError, match="Did you mean 'kl_coef'"):
        make(env_id, kl_coeff=1.0)


@pytest.mark.parametrize("seed", [0.0, "34", True, -1, [0, 1, 2.0], [0, 1, -2], [0, True, 1], {3: 4}, [[0], [1], [2]]])
def test_a_seed_that_is_none_is_refused(parts: Parts, seed: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`seed` must be an int"):
        make_vec(parts).reset(seed=seed)


def test_seeds_of_numpy_are_seeds(parts: Parts) -> None:
    expected = make_vec(parts).reset(seed=3)
    for seed in (np.int64(3), np.arange(3, 6), (3, np.int32(4), 5)):
        assert data_equivalence(make_vec(parts).reset(seed=seed), expected)
    assert data_equivalence(
        make_vec(parts).reset(seed=[3, None, 5])[0]["input_ids"][[0, 2]], expected[0]["input_ids"][[0, 2]]
    )


@pytest.mark.parametrize("options", [1, "prompt", [("prompt", "a")]])
def test_options_that_are_none_are_refused(parts: Parts, options: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`options` must be a dict or None"):
        make_vec(parts).reset(options=options)


NO_ACTIONS = [[[1], [2, 3], 4], [[1, 2], [3]], torch.ones(N, dtype=torch.bfloat16), None, "abc", {}, [None] * N]


@pytest.mark.parametrize("actions", NO_ACTIONS, ids=repr)
def test_actions_that_are_none_are_refused(parts: Parts, actions: Any) -> None:
    wrapped = (lambda env: env, lambda env: VectorTopKActions(env, 3))
    for wrap in wrapped:
        envs = wrap(make_vec(parts))
        envs.reset(seed=0)
        with pytest.raises(InvalidActionError, match="`action` must be"):
            envs.step(actions)
    env = gym.make(ID, **parts).unwrapped
    env.reset(seed=0)
    with pytest.raises(InvalidActionError, match="`action` must be"):
        env.step(actions)


def test_log_probs_of_any_float_are_taken_and_ragged_ones_refused(parts: Parts) -> None:
    envs = VectorPolicyKL(make_vec(parts))
    envs.reset(seed=0)
    exact = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    rewards: list[Any] = []
    for log_prob in (exact, exact.bfloat16(), exact.detach().numpy(), [-0.5, -1, -2]):
        envs.reset(seed=0)
        rewards.append(envs.step({"token": [5, 5, 5], "log_prob": log_prob})[1])
        np.testing.assert_allclose(rewards[-1], rewards[0], atol=1e-6)
    for log_prob in ([[0.0], [0.0, 1.0], 2.0], "abc", [None] * 3, [0.0] * 2):
        with pytest.raises(InvalidActionError, match="`log_prob` must be log-probs"):
            envs.step({"token": [5, 5, 5], "log_prob": log_prob})
    single = PolicyKL(gym.make(ID, **parts))
    single.reset(seed=0)
    with pytest.raises(InvalidActionError, match="`log_prob` must be log-probs"):
        single.step({"token": 5, "log_prob": [[0.0], 1.0]})


# --- the vector env as others take it --------------------------------------------------------------------------------


def test_the_mode_and_the_frame_rate_are_where_others_look(parts: Parts) -> None:
    for mode in MODES:
        envs = make_vec(parts, mode)
        wrapped = [VectorTopKActions(envs, 3), VectorActionMask(envs, top_k=3), VectorPolicyKL(envs)]
        for env in (envs, *wrapped, VectorTextObservation(envs), VectorEmbeddingObservation(envs)):
            assert env.autoreset_mode == env.metadata["autoreset_mode"] == AutoresetMode(mode)
            assert env.metadata["render_fps"] == gym.make(ID, **parts).metadata["render_fps"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["token", "bandit", "group", "wrapped"])
def test_a_copy_of_a_vector_env_goes_on_like_the_original(parts: Parts, mode: str, kind: str) -> None:
    config = {**parts, "autoreset_mode": mode, "truncate": True} | ({"group_size": 3} if kind == "group" else {})
    envs: Any = (RLHFBanditVectorEnv if kind == "bandit" else RLHFVectorEnv)(N, **config)
    if kind == "wrapped":
        envs = VectorEmbeddingObservation(VectorTopKActions(envs, 4))
    fresh = pickle.loads(pickle.dumps(envs))
    assert data_equivalence(fresh.reset(seed=0), envs.reset(seed=0))
    rng = np.random.default_rng(0)
    for step in range(3 * T):
        if step % 5 == 1:
            fresh = pickle.loads(pickle.dumps(fresh))
        actions = rng.integers(1, 4, envs.action_space.shape)
        found = fresh.step(actions)
        expected = envs.step(actions)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
        for a, b in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
            assert data_equivalence(a, b)
        ended = expected[2] | expected[3]
        if mode == "Disabled" and ended.any():
            for env in (envs, fresh):
                env.reset(options={"reset_mask": ended})


FORK = """
import gymnasium as gym, torch, lmgym
settings = dict(device="cpu", max_new_tokens=4)
env = gym.make("lmgym/RLHF-v0", **settings)
env.reset(seed=0), env.step(5)
envs = gym.make_vec("lmgym/RLHF-v0", num_envs=1, vectorization_mode="async", **settings)
envs.reset(seed=0)
for _ in range(6):
    envs.step(envs.action_space.sample())
envs.close()
print("stepped", torch.get_num_threads())
"""


@pytest.mark.slow
def test_worker_processes_do_not_wait_for_ever() -> None:
    """Forked after use, with several threads; and the process that forks keeps its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FORK]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["stepped", "2"]
