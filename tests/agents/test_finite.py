"""Training that diverges ends with an error that names what was not finite first; the checkpoint stays as it was."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import TinyProblem, learn, weights
from extras import needs_contrib
from shipped import ON_POLICY, SUPERVISED
from torch import Tensor

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO, GRPOConfig
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.reference import Reference
from agents.algorithms.sft import SFT
from agents.algorithms.trpo import TRPO
from agents.finite import all_finite, check_saving, check_step, check_weights
from agents.sb3.agent import SB3Agent
from agents.sb3.config import SB3Config
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import LmGymError, NotFiniteError, RewardError
from lmgym.evaluation import evaluate
from lmgym.models.sampling import Sampler, check_finite_log_probs, inverse_cdf
from lmgym.rewards.base import score
from lmgym.rollout import collect, collect_steps
from lmgym.tasks.base import Task

PROBLEM = TinyProblem()
NAN = float("nan")


def envs_of(rows: int = 1, group: int = 1, task: Task = PROBLEM.task) -> RLHFVectorEnv:
    return RLHFVectorEnv(rows, group_size=group, autoreset_mode="SameStep", task=task, split="train", device="cpu")


def agent_of(kind: Any, task: Task = PROBLEM.task, **config: Any) -> Any:
    made = kind.Config(**{"batch_size": 24, "policy": "finetune", **config})
    return kind(envs_of(made.num_envs, getattr(made, "responses", 1), task), made, seed=0)


def sb3_of(algorithm: Any, **config: Any) -> SB3Agent:
    return SB3Agent(envs_of(8), SB3Config(algorithm=algorithm, n_envs=8, n_steps=16, **config), seed=0)


# -- what is checked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf])
def test_one_number_among_many_is_seen(dtype: torch.dtype, wrong: float) -> None:
    tensors = [torch.full((7, 5), 60000.0).to(dtype), torch.zeros(3), torch.zeros(0), torch.ones(2, dtype=torch.int64)]
    assert all_finite(tensors)
    assert all_finite([torch.full((9,), 3e38)])  # whose 2-norm is beyond float32
    tensors[0][3, 2] = wrong
    assert not all_finite(tensors)


def test_what_was_not_finite_first_is_named_and_what_to_try() -> None:
    policy = torch.nn.Linear(3, 1)
    config = PPOConfig(lr=0.5, max_grad_norm=0.0)
    fine = torch.ones(4)
    huge = torch.full((4,), 1e30)
    wrong = {"train/policy_loss": 1.0, "train/value_loss": math.inf, "train/grad_norm": NAN}
    check_step({"train/value_loss": 1.0, "train/entropy": NAN, "train/grad_norm": 2.0}, policy, config, {})
    with pytest.raises(NotFiniteError) as caught:
        check_step(wrong, policy, config, {"scores": fine, "returns": fine})
    assert str(caught.value) == (
        "Training has diverged: `train/value_loss` is inf. Try `agent.max_grad_norm=1` (gradients are not clipped), or "
        "a lower `agent.lr` (it is 0.5)."
    )
    with pytest.raises(NotFiniteError, match=r"is inf\. Try a reward of smaller numbers, or"):
        check_step(wrong, policy, config, {"scores": huge})
    with pytest.raises(NotFiniteError, match=r"Try `env.dtype=bfloat16` \(.*65,504\), or a reward .*, or a lower"):
        check_step(wrong, torch.nn.Linear(3, 1, dtype=torch.float16), PPOConfig(), {"scores": huge})
    with pytest.raises(NotFiniteError, match=r"`returns` has 4 of 4 numbers that are not finite \(inf\)"):
        check_step(wrong, policy, config, {"scores": fine, "returns": huge * 1e30})
    with pytest.raises(NotFiniteError, match="the log-probs that the policy gives are nan"):
        check_step({**wrong, "train/ratio_error": NAN}, policy, config, {})
    with pytest.raises(NotFiniteError, match=r"kl_estimator=exact.*88 nats"):
        check_step({"train/kl_loss": math.inf}, policy, GRPOConfig(), {})
    with torch.no_grad():
        policy.weight[0, 1] = NAN
    with pytest.raises(NotFiniteError, match=r"`weight weight` has 1 of 3 numbers that are not finite \(nan\)"):
        check_step(wrong, policy, config, {"returns": huge * 1e30})
    with pytest.raises(NotFiniteError, match=r"`weight weight` .*adam_eps=1e-5"):
        check_weights(policy, PPOConfig(adam_eps=0.0))


def test_an_optimiser_that_would_never_step_again_is_not_saved() -> None:
    weight = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(weight.parameters())
    weight(torch.full((1, 2), 1e25)).sum().backward()  # its square is beyond float32
    optimizer.step()
    check_weights(weight, PPOConfig())
    with pytest.raises(NotFiniteError, match=r"the optimiser's state `0.exp_avg_sq` has 2 of 2"):
        check_saving(weight, optimizer, PPOConfig())


# -- agents that diverge ---------------------------------------------------------------------------------------------

EXPLODING: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(agent_of, kind, lr=1e30) for name, kind in (ON_POLICY | SUPERVISED).items()},
    "ppo, no epsilon": lambda: agent_of(PPO, adam_eps=0.0),
    "ppo, scores too large": lambda: agent_of(PPO, replace(PROBLEM.task, reward=huge_reward)),
    "a2c on a network": lambda: agent_of(A2C, lr=1e30, policy="mlp"),
    "grpo, k3 beyond 88 nats": lambda: agent_of(GRPO, lr=30.0, max_grad_norm=0.0),
    "trpo, scores too large": lambda: agent_of(TRPO, replace(PROBLEM.task, reward=huge_reward)),
    "sft, no epsilon": lambda: agent_of(SFT, adam_eps=0.0),
    "sb3 ppo": lambda: sb3_of("PPO", learning_rate=1e30, batch_size=32, n_epochs=1),
    "sb3 a2c": lambda: sb3_of("A2C", learning_rate=1e30),
    "sb3 dqn": lambda: sb3_of("DQN", learning_rate=1e30, kwargs={"buffer_size": 500, "learning_starts": 32}),
}
CONTRIB = {"sb3 trpo": lambda: sb3_of("TRPO", learning_rate=1e30, policy="mlp", kwargs={"cg_max_steps": 1})}


def huge_reward(prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]:
    """Numbers that float32 holds, and whose squares it does not."""
    return [1e30 * len(ids) for ids in columns["completion_ids"]]


@pytest.mark.parametrize("case", [*EXPLODING, *(pytest.param(name, marks=needs_contrib) for name in CONTRIB)])
def test_an_agent_that_diverges_says_so_and_its_checkpoint_stays(case: str, tmp_path: Path) -> None:
    agent = {**EXPLODING, **CONTRIB}[case]()
    agent.save(tmp_path / "checkpoint")
    before = {file.name: file.read_bytes() for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()}
    with pytest.raises(NotFiniteError, match=r"has diverged: .* Try .*lower|must give finite log-probs"):
        agent.learn(4_000)
    networks = agent.model.policy if isinstance(agent, SB3Agent) else agent.policy
    with torch.no_grad():
        next(networks.parameters()).fill_(NAN)
    with pytest.raises(NotFiniteError, match="numbers that are not finite"):
        agent.save(tmp_path / "checkpoint")
    assert {f.name: f.read_bytes() for f in (tmp_path / "checkpoint").rglob("*") if f.is_file()} == before


def test_a_gradient_that_is_no_number_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(PPO, minibatches=2, epochs=1)
    plain = agent.loss
    seen = []

    def broken(batch: Any) -> Any:
        loss, metrics = plain(batch)
        seen.append(weights(agent))
        return (loss * NAN if len(seen) == 2 else loss), metrics

    monkeypatch.setattr(agent, "loss", broken)
    with pytest.raises(NotFiniteError, match="`train/grad_norm` is nan"):
        learn(agent, 1)
    assert not torch.equal(seen[0], seen[1])  # the first step was taken
    assert torch.equal(weights(agent), seen[1])  # the second was not


# -- a policy that is no distribution ----------------------------------------------------------------------------------

SAMPLERS = [Sampler(), Sampler(temperature=0.0), Sampler(top_k=2), Sampler(top_p=0.5), Sampler(greedy_tokens=9)]


@pytest.mark.parametrize("vocabulary", [6, 5000])
@pytest.mark.parametrize("row", [[NAN, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_logits_that_are_no_distribution_give_a_token_and_no_log_prob(
    vocabulary: int, row: list[float], sampler: Sampler
) -> None:
    logits = torch.zeros(2, vocabulary)
    logits[0] = torch.tensor(row).repeat(vocabulary // 2)
    tokens, log_probs = sampler.sample(logits, 0, torch.tensor([0.3, 0.3], dtype=torch.float64))
    assert bool(((tokens >= 0) & (tokens < vocabulary)).all())
    assert log_probs.isfinite().tolist() == [False, True]
    with pytest.raises(NotFiniteError, match="1 of 2 are nan"):
        check_finite_log_probs(log_probs)


def test_a_last_uniform_still_draws_no_token_of_probability_0() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    tokens, _ = inverse_cdf(logits, torch.tensor([1 - 1e-16], dtype=torch.float64))
    assert tokens.tolist() == [1]


class Broken:
    """A policy that gives NaN from its second token on; its own running responses."""

    device = torch.device("cpu")
    values = None

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> Any:
        self.logits = torch.zeros(len(prompt_ids), PROBLEM.lm.vocab_size)
        return self

    def step(self, tokens: Tensor) -> None:
        self.logits = torch.full((len(tokens), PROBLEM.lm.vocab_size), NAN)

    def keep(self, rows: Tensor) -> None:
        self.logits = self.logits[rows]


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.0)])
def test_a_policy_that_is_no_distribution_is_an_error_and_no_grade(sampler: Sampler) -> None:
    envs = envs_of(4)
    policy = cast(Any, Broken())
    envs.reset(seed=0)
    grade = functools.partial(evaluate, policy, envs, samples=2, sampler=sampler, exact=True)
    calls = [grade, lambda: collect(envs, policy, 4, sampler), lambda: collect_steps(envs, policy, 4, sampler)]
    for call in calls:
        with pytest.raises(LmGymError, match="A policy must give finite log-probs"):
            call()


def test_predicting_with_weights_that_are_not_finite_is_an_error() -> None:
    agent = agent_of(PPO)
    observation, _ = agent.envs.reset(seed=0)
    with torch.no_grad():
        agent.policy.value_head.weight.fill_(NAN)
        agent.predict(observation)  # the critic has no say in it
        agent.policy.actor.get_output_embeddings().weight.fill_(NAN)
    with pytest.raises(NotFiniteError):
        agent.predict(observation)
    follower = Reference(agent.envs)
    follower.policy = agent.policy  # token by token, where the agent's own `predict` is one forward
    with pytest.raises(NotFiniteError):
        follower.predict(observation)


@pytest.mark.parametrize("value", [1e39, -1e39, 10**39])
def test_a_score_that_float32_does_not_hold_is_refused(value: float) -> None:
    with pytest.raises(RewardError, match=r"must return finite numbers, and returned .* Agents compute in float32"):
        score(lambda **_: [value], ["x"], ["y"])
    assert score(lambda **_: [3e38], ["x"], ["y"]) == [3e38]
