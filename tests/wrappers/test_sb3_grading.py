"""Grading models of Stable-Baselines3 on the scale of V*: against distributions whose J is known, and real models."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import DQN, PPO

import lmgym  # noqa: F401 - registers the environments
from lmgym.errors import InvalidArgumentError
from lmgym.optimum import solve
from lmgym.sb3 import PolicyKLCallback, VecEnvBridge, evaluate
from lmgym.tasks import make_task
from lmgym.wrappers import VectorActionMask

TASK = make_task("brackets-1")


def make(rows: int, **changes: Any) -> Any:
    return gym.make_vec("lmgym/RLHF-v0", num_envs=rows, task=TASK, autoreset_mode="SameStep", device="cpu", **changes)


class FixedModel:
    """A model that does what `logits_of` says of the states of an env."""

    def __init__(self, envs: Any, pi_star: bool) -> None:
        self.policy = self
        self._envs = envs
        self._pi_star = pi_star
        self._solved = solve(envs.unwrapped.task, split=envs.unwrapped.settings.split).policy

    def set_training_mode(self, mode: bool) -> None:
        pass

    def obs_to_tensor(self, observation: Any) -> Any:
        return observation, True

    def get_distribution(self, observation: Any) -> Any:
        engine = self._envs.unwrapped.engine
        logits = engine.reference_logits().float().clone()
        if self._pi_star:
            for row in range(engine.num_rows):
                state = self._solved.begin(torch.tensor([engine.current[row].ids]), torch.ones(1, 1).bool(), 6)
                for token in engine.response_ids(row):
                    state.step(torch.tensor([token]))
                logits[row] = state.logits[0].float()
        return type("Distribution", (), {"distribution": torch.distributions.Categorical(logits=logits)})

    def predict(self, observation: Any, state: Any = None, deterministic: bool = False) -> Any:
        assert deterministic
        return self.get_distribution(observation).distribution.logits.argmax(-1).numpy(), None


def test_the_reference_is_0_and_the_optimum_1() -> None:
    """Every episode of pi* has the very return V*: its score less the whole KL it pays. The env's own is another."""
    envs = make(64)
    reference = evaluate(FixedModel(envs, False), envs, samples=256)
    assert reference.normalised is not None
    assert reference.normalised.low <= 0 <= reference.normalised.high
    assert abs(reference.metrics["kl"].mean) < 1e-4
    best = evaluate(FixedModel(envs, True), envs, samples=64)
    assert best.optimum is not None
    assert best.metrics["return"].mean == pytest.approx(best.optimum.value, abs=1e-4)
    assert best.normalised is not None
    assert best.normalised.mean == pytest.approx(1, abs=1e-3)
    assert best.metrics["kl"].mean > 0.1


def test_a_certain_model_pays_for_all_its_surprise() -> None:
    envs = make(4)
    grade = evaluate(FixedModel(envs, True), envs, samples=4, deterministic=True)
    observation, _ = envs.reset(options={"prompt_index": 0})
    returns = 0.0
    ended = False
    while not ended:
        observation, rewards, terminated, _, _ = envs.step(
            FixedModel(envs, True).predict(observation, deterministic=True)[0]
        )
        returns = returns + rewards[0]
        ended = bool(terminated[0])
    assert grade.metrics["return"].mean == pytest.approx(returns, abs=1e-5)
    assert grade.metrics["kl"].mean == pytest.approx((grade.metrics["score"].mean - returns) / TASK.kl_coef, abs=1e-4)


def test_models_of_every_kind_are_graded() -> None:
    small: Any = {"n_steps": 8, "batch_size": 32, "n_epochs": 1, "device": "cpu", "gamma": 1.0}
    envs = make(4, obs_format="onehot")
    flat = {"policy": "MlpPolicy", "seed": 0}
    masked = VectorActionMask(envs, top_k=4)
    callback = PolicyKLCallback()
    ppo = PPO(env=VecEnvBridge(envs), **flat, **small).learn(64, callback=callback)
    assert (callback.kl_coef, callback.dense) == (TASK.kl_coef, True)
    models = [
        (ppo, envs),
        (MaskablePPO(env=VecEnvBridge(masked), **flat, **small), masked),
        (RecurrentPPO("MlpLstmPolicy", VecEnvBridge(envs), **small), envs),
        (DQN(env=VecEnvBridge(envs), **flat, device="cpu"), envs),
    ]
    for model, graded in models:
        grade = evaluate(model, graded, samples=6)
        assert grade.normalised is not None
        assert grade.normalised.high < 1.01
        assert grade.metrics.keys() == {"return", "score", "kl", "length"}
        again = evaluate(model, graded, samples=6)
        assert again.metrics == grade.metrics


def test_other_resets_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="must have the autoreset_mode 'SameStep', got 'NextStep'"):
        evaluate(None, gym.make_vec("lmgym/Brackets-2-v0", device="cpu"))


def test_when_the_kl_is_paid_is_no_matter() -> None:
    grades = []
    for dense in (True, False):
        envs = make(8, dense_kl=dense, obs_format="flat")
        grades.append(evaluate(lambda tokens: tokens.float().clamp(0, 1)[:, :6] * 3, envs, samples=32))
    for name in ("return", "kl", "score"):
        assert grades[0].metrics[name].mean == pytest.approx(grades[1].metrics[name].mean, abs=1e-4)


def test_a_function_of_logits_is_a_model() -> None:
    """The uniform distribution, whose KL is minus the entropy and the mean log-prob of the reference."""
    envs = make(32)
    grade = evaluate(lambda observation: torch.zeros(len(observation["input_ids"]), 6), envs, samples=64)
    j, kl, score = (grade.metrics[name].mean for name in ("return", "kl", "score"))
    assert j == pytest.approx(score - TASK.kl_coef * kl, abs=1e-5)
    assert kl > 0.1


def test_without_a_price_there_is_no_kl_and_a_discount_counts() -> None:
    uniform = lambda observation: torch.zeros(len(observation["input_ids"]), 6)  # noqa: E731
    grade = evaluate(uniform, make(8, kl_coef=0.0), samples=8)
    assert grade.metrics.keys() == {"return", "score", "length"}
    assert grade.metrics["return"] == grade.metrics["score"]
    one, other = (
        evaluate(uniform, make(8, kl_coef=0.0, gamma=gamma, min_new_tokens=5), samples=8) for gamma in (1.0, 0.5)
    )
    assert other.metrics["score"] == one.metrics["score"]
    assert other.metrics["return"].mean == pytest.approx(0.5**5 * one.metrics["return"].mean)
