"""The policy's half of the KL, paid step by step: the reward is then the whole r_t of the design."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import WORDS, TinyProblem, gpt2, word_tokenizer
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lmgym.errors import InvalidActionError
from lmgym.kl import token_rewards
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.rollout import collect
from lmgym.wrappers import PolicyKL, VectorPolicyKL

ID = "lmgym/RLHF-v0"
EOS = 1
V = len(WORDS) + 3
T = 8
N = 4
MODES = [mode.value for mode in AutoresetMode]
Parts = dict[str, Any]


def actions_of(rng: np.random.Generator, n: int = N) -> dict[str, np.ndarray]:
    tokens = rng.integers(2, V, n)
    tokens[rng.random(n) < 0.15] = EOS
    return {"token": tokens, "log_prob": -3 * rng.random(n)}


def test_the_reward_loses_the_price_of_the_log_prob(parts: Parts) -> None:
    env = PolicyKL(gym.make(ID, **parts))
    plain = gym.make(ID, **parts)
    assert data_equivalence(env.reset(seed=0), plain.reset(seed=0))
    for token, log_prob in ((5, -1.5), (6, 0.0), (EOS, -0.25)):
        action = {"token": token, "log_prob": np.array(log_prob)}
        assert env.action_space.contains({"token": token, "log_prob": np.array(log_prob)})
        found = env.step(action)
        expected = plain.step(token)
        assert found[1] == pytest.approx(expected[1] - 0.2 * log_prob, abs=1e-12)  # a likely token pays less
        assert found[1] >= expected[1]
        assert type(found[1]) is float
        assert data_equivalence([found[0], *found[2:]], [expected[0], *expected[2:]])


def test_the_whole_reward_is_that_of_the_episode_path(parts: Parts) -> None:
    """What a policy sampled, with its own log-probs: stepping pays what `token_rewards` computes."""
    policy = CausalPolicy(CausalLM(freeze(gpt2(V, seed=11)), word_tokenizer()))
    for config in ({}, {"dense_kl": False}, {"missing_eos_penalty": 1.0}):
        envs = gym.make_vec(ID, num_envs=N, **parts, **config)
        episodes = collect(envs, policy, 12, Sampler(temperature=0.8), torch.Generator().manual_seed(0))
        rewards = token_rewards(episodes, 0.2, dense=bool(config.get("dense_kl", True))).numpy()
        env = PolicyKL(gym.make(ID, **parts, **config))
        for i in range(len(episodes)):
            env.reset(options={"prompt_index": int(episodes.prompt_index[i])})
            paid = [
                env.step({"token": int(episodes.response_ids[i, t]), "log_prob": float(episodes.log_probs[i, t])})[1]
                for t in range(int(episodes.lengths[i]))
            ]
            np.testing.assert_allclose(paid, rewards[i, : len(paid)], rtol=0, atol=1e-5)
            assert sum(paid) == pytest.approx(rewards[i].sum(), abs=1e-5)


def test_the_return_of_the_optimum_is_its_value() -> None:
    """With pi = pi* the whole return is V*(x), whatever it says."""
    problem = TinyProblem(horizon=2)
    env = PolicyKL(gym.make("lmgym/RLHFBandit-v0", task=problem.task))
    for i, prompt in enumerate(problem.prompts):
        value, log_probs = problem.optimum(prompt)
        for response, log_prob in zip(problem.responses, log_probs.tolist(), strict=True):
            env.reset(options={"prompt_index": i})
            token = [*response, *[0] * (problem.T - len(response))]
            assert env.step({"token": token, "log_prob": log_prob})[1] == pytest.approx(value, abs=1e-5)


def make_pair(parts: Parts, mode: str, **changes: Any) -> tuple[VectorPolicyKL, SyncVectorEnv]:
    one = VectorPolicyKL(gym.make_vec(ID, num_envs=N, autoreset_mode=mode, **{**parts, **changes}))
    other = SyncVectorEnv(
        [lambda: PolicyKL(gym.make(ID, **{**parts, **changes}))] * N, autoreset_mode=AutoresetMode(mode)
    )
    return one, other


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [{}, {"dense_kl": False}, {"kl_coef": 0.0}], ids=str)
def test_the_vector_form_is_the_single_one_n_times(parts: Parts, config: Parts, mode: str) -> None:
    one, other = make_pair(parts, mode, **config)
    assert one.action_space == other.action_space
    assert data_equivalence(one.reset(seed=0), other.reset(seed=0))
    rng = np.random.default_rng(1)
    ends = 0
    for t in range(40):
        actions = actions_of(rng)
        assert one.action_space.contains(actions)
        # Gymnasium's sync env takes the batch apart itself.
        left = one.step(actions)
        right = other.step(actions)
        for name, a, b in zip(("obs", "reward", "terminated", "truncated", "info"), left, right, strict=True):
            assert data_equivalence(a, b), f"{name} at step {t}: {a} against {b}"
        ended = left[2] | left[3]
        ends += ended.sum()
        if mode == "Disabled" and ended.any():
            one.reset(options={"reset_mask": ended})
            other.reset(options={"reset_mask": ended})
    assert ends > 12


def test_a_row_that_is_being_reset_pays_nothing_also_beside_a_masked_reset(parts: Parts) -> None:
    one, other = make_pair(parts, "NextStep")
    for envs in (one, other):
        envs.reset(seed=0)
    log_prob = np.full(N, -2.0)
    first = {"token": np.array([EOS, EOS, 5, 5]), "log_prob": log_prob}
    assert data_equivalence(one.step(first), other.step(first))
    mask = np.array([False, True, True, False])  # row 0 has ended too, and resets itself in the next step
    for envs in (one, other):
        envs.reset(options={"reset_mask": mask})
    then = {"token": np.array([6, 6, 6, 6]), "log_prob": log_prob}
    left = one.step(then)
    right = other.step(then)
    assert left[1][0] == 0
    assert data_equivalence(left, right)


def test_a_spec_rebuilds_it(parts: Parts) -> None:
    env = PolicyKL(gym.make(ID, **parts))
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert data_equivalence(again.reset(seed=4), env.reset(seed=4))
    action = {"token": 5, "log_prob": -0.5}
    assert data_equivalence(again.step(action), env.step(action))


def test_what_is_no_pair_is_refused(parts: Parts) -> None:
    env = PolicyKL(gym.make(ID, **parts))
    env.reset(seed=0)
    for action in (5, {"token": 5}):
        with pytest.raises(InvalidActionError, match="`action` must be a dict of token and log_prob, got"):
            env.step(action)  # type: ignore[arg-type]


def test_gymnasiums_own_vector_env_can_be_wrapped(parts: Parts) -> None:
    sync = SyncVectorEnv([lambda: gym.make(ID, **parts)] * N, autoreset_mode=AutoresetMode.SAME_STEP)
    one = VectorPolicyKL(sync)
    other = make_pair(parts, "SameStep")[0]
    assert data_equivalence(one.reset(seed=0), other.reset(seed=0))
    rng = np.random.default_rng(2)
    for _ in range(15):
        actions = actions_of(rng)
        assert data_equivalence(one.step(actions), other.step(actions))


@pytest.mark.parametrize("log_prob", [0.1, np.nan, [-1.0], [[-1.0]], np.full(3, -1.0)], ids=repr)
def test_what_is_no_log_prob_is_refused_and_changes_nothing(parts: Parts, log_prob: Any) -> None:
    env = PolicyKL(gym.make(ID, **parts))
    envs = make_pair(parts, "SameStep")[0]
    env.reset(seed=0)
    envs.reset(seed=0)
    with pytest.raises(InvalidActionError, match=r"`log_prob` must be log-probs \(<= 0, nats\) of shape \(\), got"):
        env.step({"token": 5, "log_prob": log_prob})
    with pytest.raises(InvalidActionError, match=r"`log_prob` must be log-probs \(<= 0, nats\) of shape \(4,\), got"):
        envs.step({"token": np.full(N, 5), "log_prob": log_prob})
    observation, *_ = env.step({"token": 5, "log_prob": -1})
    assert observation["attention_mask"][6:].sum() == 1


def test_round_off_above_zero_is_forgiven(parts: Parts) -> None:
    env = PolicyKL(gym.make(ID, **parts))
    env.reset(seed=0)
    env.step({"token": 5, "log_prob": 1e-8})
