"""The one-step form: its reward is the token MDP's return, alone and N at a time."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import WORDS, TinyProblem
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lmgym.envs.bandit import RLHFBanditVectorEnv
from lmgym.errors import InvalidActionError, InvalidArgumentError, UnknownNameError
from lmgym.wrappers import PolicyKL

ID = "lmgym/RLHFBandit-v0"
TOKEN_ID = "lmgym/RLHF-v0"
EOS = 1
V = len(WORDS) + 3
P = 6
T = 8
N = 4
MODES = [mode.value for mode in AutoresetMode]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"dense_kl": False},
    {"truncate": True},
    {"missing_eos_penalty": 1.0, "min_new_tokens": 2},
    {"kl_coef": 0.0, "gamma": 0.7, "missing_eos_penalty": 1.0},
    {"kl_coef": 0.0},
    {"obs_format": "flat"},
]
Parts = dict[str, Any]


def responses(rng: np.random.Generator, *shape: int) -> np.ndarray:
    tokens = rng.integers(2, V, (*shape, T))
    tokens[rng.random(tokens.shape) < 0.15] = EOS
    return tokens


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_reward_is_the_return_of_the_token_mdp(parts: Parts, config: Parts) -> None:
    bandit, mdp = (gym.make(name, **{**parts, **config}) for name in (ID, TOKEN_ID))
    rng = np.random.default_rng(0)
    for episode in range(12):
        seed = 3 if episode == 0 else None
        assert data_equivalence(bandit.reset(seed=seed), mdp.reset(seed=seed))
        response = responses(rng)
        observation, reward, terminated, truncated, info = bandit.step(response)
        steps = []
        for token in response:
            steps.append(mdp.step(token))
            if steps[-1][2] or steps[-1][3]:
                break
        assert data_equivalence(observation, steps[-1][0])
        assert (terminated, truncated) == steps[-1][2:4]
        expected = steps[-1][4]
        assert reward == pytest.approx(expected["discounted_return"], abs=1e-5)
        if bandit.unwrapped.gamma == 1:
            assert reward == pytest.approx(sum(s[1] for s in steps), abs=1e-5)
        assert type(reward) is float
        assert set(info) == set(expected)
        for key, value in expected.items():
            if key == "ref_log_prob":
                value = sum(s[4].get(key, 0.0) for s in steps)
            assert info[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
def test_a_discount_of_a_sum_of_log_probs_is_refused(dense: bool) -> None:
    """J of a policy by enumeration is what the token MDP pays; with the whole sum at once it would be another number.

    The bandit would pay gamma^t kl_coef log pi_ref token by token, and take off kl_coef log pi of the whole response.
    """
    problem = TinyProblem(horizon=2)
    gamma = 0.5
    settings: Parts = {"task": problem.task, "gamma": gamma, "dense_kl": dense}
    env = PolicyKL(gym.make(TOKEN_ID, **settings))
    truth = paid = wrong = 0.0
    for x, prompt in enumerate(problem.prompts):
        own, ref = (problem.token_log_probs(lm, prompt) for lm in (problem.other, problem.lm))
        scores = problem.scores(prompt)
        for i, response in enumerate(problem.responses):
            n = len(response)
            prob = own[i].sum().exp().item() / len(problem.prompts)
            late = gamma ** (n - 1)
            discounts = torch.tensor([gamma**t if dense else late for t in range(problem.T)], dtype=torch.float64)
            truth += prob * (late * scores[i] - problem.kl_coef * (discounts * (own[i] - ref[i])).sum()).item()
            reference_half = late * scores[i] + problem.kl_coef * (discounts * ref[i]).sum()
            wrong += prob * (reference_half - problem.kl_coef * own[i].sum()).item()
            env.reset(options={"prompt_index": x})
            pairs = zip(response, own[i].tolist(), strict=False)
            rewards = [env.step({"token": token, "log_prob": log_prob})[1] for token, log_prob in pairs]
            paid += prob * sum(gamma**t * reward for t, reward in enumerate(rewards))
    assert paid == pytest.approx(truth, abs=1e-5)
    assert abs(wrong - truth) > 0.1
    for make in (gym.make, gym.make_vec):
        with pytest.raises(
            InvalidArgumentError, match=r"`gamma` must be 1 for the bandit .*, got 0.5: .*lmgym/RLHF-v0"
        ):
            make(ID, **settings)
        make(ID, **{**settings, "gamma": 1.0})
    with pytest.raises(InvalidArgumentError, match="`gamma` must be 1 for the bandit"):
        gym.make(ID, task="discount-0.9")


def test_spaces(parts: Parts) -> None:
    bandit = gym.make(ID, **parts)
    mdp = gym.make(TOKEN_ID, **parts)
    assert bandit.action_space == gym.spaces.MultiDiscrete([V] * T)
    assert bandit.observation_space == mdp.observation_space


def test_tokens_after_the_end_do_not_matter(parts: Parts) -> None:
    env = gym.make(ID, **parts).unwrapped
    seen = []
    for tail in ([7] * 5, [EOS] * 5, [-1, V, V + 50, 0, 2]):
        env.reset(seed=0)
        seen.append(env.step(np.array([5, 6, EOS, *tail])))
    assert data_equivalence(seen[0], seen[1])
    assert data_equivalence(seen[0], seen[2])
    assert seen[0][0]["attention_mask"][P:].sum() == 3
    assert (seen[2][0]["input_ids"][P + 3 :] == 0).all()


@pytest.mark.parametrize(
    "action",
    [np.full(T - 1, 5), np.full(T, 5.0), 5, np.full((1, T), 5), [5] * (T - 1) + [V], [-1] + [5] * (T - 1), None],
)
def test_what_is_no_response_is_refused_and_changes_nothing(parts: Parts, action: Any) -> None:
    env = gym.make(ID, **parts).unwrapped
    env.reset(seed=0)
    with pytest.raises(InvalidActionError, match="`action` must be "):
        env.step(action)
    env.step([5] * T)


def test_one_step_is_all_there_is(parts: Parts) -> None:
    env = gym.make(ID, **parts, render_mode="ansi").unwrapped
    with pytest.raises(ResetNeeded):
        env.step([5] * T)
    env.reset(options={"prompt": "a film"})
    _, reward, *_ = env.step([5, 6, EOS] + [0] * 5)
    text = env.render()
    assert "prompt: a film" in text
    assert f"return: {reward:+.3f}" in text
    assert "3/8" in text
    with pytest.raises(ResetNeeded):
        env.step([5] * T)


def test_a_prefix_is_no_option(parts: Parts) -> None:
    for env in (gym.make(ID, **parts), gym.make_vec(ID, num_envs=2, **parts)):
        with pytest.raises(UnknownNameError, match=r"`options` must be one of .*, got 'response_ids'"):
            env.reset(options={"response_ids": [5]})
        env.reset(options={"prompt_index": 0})


def test_pickling_and_cloned_states(parts: Parts) -> None:
    env = gym.make(ID, **parts)
    env.reset(seed=4)
    copy = pickle.loads(pickle.dumps(env))
    state = env.unwrapped.clone_state()
    response = [5, 6, 7, EOS, 0, 0, 0, 0]
    expected = env.step(response)
    assert data_equivalence(copy.step(response), expected)
    assert data_equivalence(copy.reset(), env.reset())
    env.unwrapped.restore_state(state)
    assert data_equivalence(env.step(response), expected)


def sync(parts: Parts, mode: str, **changes: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gym.make(ID, **{**parts, **changes})] * N, autoreset_mode=AutoresetMode(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_output_is_that_of_single_envs(parts: Parts, config: Parts, mode: str) -> None:
    one = gym.make_vec(ID, num_envs=N, autoreset_mode=mode, **{**parts, **config})
    other = sync(parts, mode, **config)
    assert isinstance(one, RLHFBanditVectorEnv)
    assert one.action_space == other.action_space
    assert one.single_action_space == other.single_action_space
    assert data_equivalence(one.reset(seed=1), other.reset(seed=1))
    rng = np.random.default_rng(2)
    for t in range(6):
        action = responses(rng, N)
        left = one.step(action)
        right = other.step(action)
        for name, a, b in zip(("obs", "reward", "terminated", "truncated", "info"), left, right, strict=True):
            assert data_equivalence(a, b), f"{name} at step {t}: {a} against {b}"
        assert (left[2] | left[3]).all() == (mode != "NextStep" or t % 2 == 0)
        if mode == "Disabled":
            assert data_equivalence(one.reset(), other.reset())


def test_a_reset_mask_restarts_its_rows_and_no_other(parts: Parts) -> None:
    one = gym.make_vec(ID, num_envs=N, autoreset_mode="Disabled", **parts)
    other = sync(parts, "Disabled")
    for envs in (one, other):
        envs.reset(seed=1)
        envs.step(np.full((N, T), 5))
    mask = np.array([True, False, False, True])
    with pytest.raises(ResetNeeded):
        one.step(np.full((N, T), 5))
    left, right = (envs.reset(options={"reset_mask": mask}) for envs in (one, other))
    assert data_equivalence(left, right)
    assert left[0]["attention_mask"][:, P:].sum(1).tolist() == [0, T, T, 0]


def test_groups_share_prompts_and_specs_survive_json(parts: Parts) -> None:
    envs = gym.make_vec(ID, num_envs=N, group_size=2, autoreset_mode="SameStep", **parts)
    assert envs.spec is not None
    again = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    rng = np.random.default_rng(3)
    observation = envs.reset(seed=0)[0]
    again_observation = again.reset(seed=0)[0]
    for _ in range(8):
        assert data_equivalence(observation, again_observation)
        assert (observation["input_ids"][0::2] == observation["input_ids"][1::2]).all()
        action = responses(rng, N)
        observation = envs.step(action)[0]
        again_observation = again.step(action)[0]
