"""What holds of every agent that samples its own episodes: first steps, metrics, breaks, groups, configs, learning."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import hydra
import numpy as np
import pytest
import torch
from commands import run_command_here
from conftest import learn, shifted, table_reward, weights
from omegaconf import OmegaConf
from shipped import ON_POLICY, SUPERVISED, fields_of
from torch import Tensor

import agents.train  # noqa: F401  has Hydra read conf as the commands do
from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.klq import KLQ
from agents.algorithms.nlpo import NLPO
from agents.algorithms.pcl import PCL
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.algorithms.trpo import TRPO
from agents.batch import Batch
from agents.diagnostics import check_groups
from agents.on_policy import OnPolicyAgent
from agents.policies.choice import PolicyConfig
from agents.runs.config import validated
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LmGymError, UnknownNameError
from lmgym.intervals import Interval
from lmgym.kl import token_rewards
from lmgym.models.causal import CausalLM
from lmgym.models.sampling import Sampler
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.tree import Tree
from lmgym.scores import normalised
from lmgym.tasks import make_task
from lmgym.tasks.base import Task

ROOT = Path(__file__).parents[2]
PAIRS = {"group_size": 4}


class Case(NamedTuple):
    """An algorithm with one of its settings."""

    kind: type[OnPolicyAgent]
    config: dict[str, Any]


ELSEWHERE = (TRPO, NLPO)  # their updates are not those of the template, and are tested in their own files
KINDS = {name: kind for name, kind in ON_POLICY.items() if kind not in ELSEWHERE}
GROUPED = [kind for kind in KINDS.values() if fields_of(kind, PAIRS)]
CASES = {
    **{name: Case(kind, fields_of(kind, PAIRS)) for name, kind in KINDS.items() if kind is not REINFORCE},
    **{f"reinforce {b}": Case(REINFORCE, {"baseline": b}) for b in ("none", "mean", "moving_average", "value")},
    "grpo exact": Case(GRPO, {**PAIRS, "kl_estimator": "exact"}),
    "dr grpo": Case(GRPO, {**PAIRS, "scale_by_std": False, "length_mean": False}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
grouped_kind = pytest.mark.parametrize("kind", GROUPED)


@functools.cache
def reference() -> CausalLM:
    """A random table over an EOS and three words."""
    return markov_lm(dirichlet_rows(np.random.default_rng(0), 4, 4, 2.0), ["x", "y", "z"])


def tiny(horizon: int = 4, **changes: Any) -> Task:
    """Three prompts with short, ragged responses; the score rides on every token, its position and the end."""
    fields = {"prompts": {"train": ["x", "y z", "z z x"]}, "kl_coef": 0.4, "max_new_tokens": horizon}
    return Task(**{"name": "tiny", "model": reference, "reward": table_reward, **fields, **changes})


def envs_of(config: Any, task: Task, **settings: Any) -> RLHFVectorEnv:
    """Rows as many, and in such groups, as a config asks for."""
    rows = config.num_envs
    group = config.responses
    return RLHFVectorEnv(rows, group_size=group, autoreset_mode="SameStep", task=task, device="cpu", **settings)


def agent_of(case: Case, *, task: Task | None = None, seed: int = 0, **config: Any) -> OnPolicyAgent:
    """A small agent, on three prompts with ragged responses."""
    small = {"batch_size": 24, "policy": "mlp", "width": 16}
    made = case.kind.Config(**{**small, **case.config, **config})
    return case.kind(envs_of(made, task or tiny()), made, seed=shifted(seed))


# -- the first steps -------------------------------------------------------------------------------------------------

ROLLOUT = ("return", "score", "kl", "exact_kl", "length", "eos_fraction")
ALWAYS = (
    {f"rollout/{name}" for name in ROLLOUT}
    | {f"train/{name}" for name in ("kl_coef", "lr", "entropy", "ratio_error", "grad_norm", "updates")}
    | {"cost/forward_tokens", "cost/backward_tokens"}
)


@functools.cache
def begun(name: str) -> tuple[OnPolicyAgent, Tensor, list[dict[str, float]]]:
    """An agent after three batches, its weights before them, and their metrics: for tests that only look."""
    agent = agent_of(CASES[name])
    before = weights(agent)
    return agent, before, learn(agent, 3)


@pytest.mark.parametrize("name", CASES)
def test_at_first_the_kl_is_zero_and_the_ratio_one(name: str) -> None:
    agent, before, (first, second, third) = begun(name)
    assert abs(first["rollout/kl"]) < 1e-5
    assert abs(first["rollout/exact_kl"]) < 1e-5
    assert first["rollout/return"] == pytest.approx(first["rollout/score"], abs=1e-5)
    for metrics in (first, second, third):
        assert metrics["train/ratio_error"] < 1e-5
    assert third["rollout/exact_kl"] > 1e-6
    assert not torch.equal(weights(agent), before)


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_finite_and_have_their_names(name: str) -> None:
    """Those of the template are always there; the page of an agent lists those of its own (tests/test_readme.py)."""
    agent, _, history = begun(name)
    for metrics in history:
        own = metrics.keys() - ALWAYS - {"step"}
        assert metrics.keys() >= ALWAYS
        assert all(name.startswith("train/") for name in own)
        assert any(name.endswith("_loss") for name in own)
        assert ("train/explained_variance" in own) == agent.uses_critic
        assert all(math.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("name", CASES)
def test_only_a_critic_that_is_used_learns(name: str) -> None:
    agent, _, _ = begun(name)
    moved = any(p.abs().max().item() > 0 for p in agent.policy.value_head.parameters())  # type: ignore[union-attr]
    assert moved == agent.uses_critic


@every_case
@pytest.mark.parametrize("sampler", [Sampler(temperature=0.7), Sampler(top_k=3)], ids=["temperature", "top_k"])
def test_the_update_is_of_the_distribution_that_sampled(case: Case, sampler: Sampler) -> None:
    agent = agent_of(case)
    agent.sampler = sampler
    for metrics in learn(agent, 2):
        assert metrics["train/ratio_error"] < 1e-5
        assert all(math.isfinite(x) for x in metrics.values())


@every_case
def test_tokens_that_leave_a_truncated_distribution_during_an_update_do_no_harm(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(case, epochs=6, minibatches=2, lr=0.03)
    left = []
    agent.sampler = Sampler(top_k=2)
    loss = agent.loss
    monkeypatch.setattr(agent, "loss", lambda batch: left.append((batch.log_probs == -math.inf).sum()) or loss(batch))
    for metrics in learn(agent, 3):
        assert all(math.isfinite(x) for name, x in metrics.items() if name != "rollout/exact_kl")
    assert weights(agent).isfinite().all()
    assert sum(left) > 0


def test_a_token_without_a_q_adds_nothing_to_klq() -> None:
    agent = agent_of(CASES["klq"])
    learn(agent, 1)
    episodes = agent.collect()
    advantages, returns = agent.advantages(episodes, agent.rewards(episodes))
    batch = agent.read(Batch(episodes, advantages, returns), torch.tensor(episodes.num_tokens), 24)
    first = torch.arange(len(batch.weights)) == 0
    gone, _ = agent.loss(replace(batch, log_probs=batch.log_probs.masked_fill(first, -torch.inf)))
    unweighted, _ = agent.loss(replace(batch, weights=batch.weights.masked_fill(first, 0.0)))
    assert gone.item() == pytest.approx(unweighted.item())
    assert gone.item() != pytest.approx(agent.loss(batch)[0].item())


@every_case
def test_micro_batches_do_not_change_the_update(case: Case) -> None:
    once = {"epochs": 1, "minibatches": 1, "max_grad_norm": 0.0}
    found = []
    for size in (24, 5):
        agent = agent_of(case, **once, micro_batch_size=size)
        learn(agent, 1)
        found.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert found[0].norm() > 1e-3


@pytest.mark.parametrize(
    "variant",
    [{"truncate": True, "gamma": 0.9}, {"kl_coef": 0.0}, {"dense_kl": False, "missing_eos_penalty": 1.0}],
    ids=str,
)
@every_case
def test_variants_of_the_problem_train(case: Case, variant: dict[str, Any]) -> None:
    if issubclass(case.kind, KLQ) and variant.get("kl_coef") == 0.0:
        pytest.skip("an action value is a log-ratio times a price")
    agent = agent_of(case, task=tiny(**variant))
    before = weights(agent)
    history = learn(agent, 2)
    assert all(math.isfinite(x) for metrics in history for x in metrics.values())
    assert not torch.equal(weights(agent), before)


@pytest.mark.parametrize("name", ["a2c", "klq", "ppo"])
def test_truncated_episodes_are_bootstrapped(name: str) -> None:
    """With lambda = 1 and a critic that says 5 everywhere, the first target is the return plus gamma^n * 5."""
    case = CASES[name]
    free = {"whiten_advantages": "none"} if case.kind is PPO else {}
    decay = {"td_lambda": 1.0} if issubclass(case.kind, KLQ) else {"gae_lambda": 1.0}
    agent = agent_of(case, task=tiny(horizon=3, truncate=True, gamma=0.9), **free, **decay)
    with torch.no_grad():
        agent.policy.value_head.bias.fill_(5.0)  # type: ignore[union-attr]
    episodes = agent.collect()
    rewards = agent.rewards(episodes)
    _, returns = agent.advantages(episodes, rewards)
    for i in range(len(episodes)):
        n = int(episodes.lengths[i])
        expected = sum(0.9**t * rewards[i, t].item() for t in range(n))
        expected += 0.0 if episodes.terminated[i] else 0.9**n * 5
        if issubclass(case.kind, KLQ):  # of Q, not of V
            expected += 0.4 * (episodes.log_probs[i, 0] - episodes.ref_log_probs[i, 0]).item()
        assert returns[i, 0].item() == pytest.approx(expected, abs=1e-4)
    assert 0 < episodes.terminated.sum() < len(episodes)


# -- breaks ----------------------------------------------------------------------------------------------------------


@every_case
def test_an_interrupted_run_goes_on_to_the_same_curve(tmp_path: Path, case: Case) -> None:
    small = {"batch_size": 8, "epochs": 2, "minibatches": 2}
    whole = learn(agent_of(case, **small), 4, total=120)
    first = agent_of(case, **small)
    second = agent_of(case, **small)
    curve = learn(first, 2, total=120)
    first.save(tmp_path / "checkpoint")
    learn(second, 1, total=120)  # a loaded agent forgets what it was
    second.load(tmp_path / "checkpoint")
    assert curve + learn(second, 2, total=120) == whole
    assert first.state()["own"].keys() == ({"average"} if case.kind is REINFORCE else set())


class Judge:
    """The reward of `tiny`, which may fail."""

    fails = False

    def __call__(self, *args: Any, **columns: Any) -> list[float]:
        if self.fails:
            raise ZeroDivisionError("the judge divides by zero")
        return table_reward(*args, **columns)


def can_step(case: Case) -> bool:
    """Whether an algorithm learns from episodes that are collected step by step."""
    try:
        case.kind.Config(**case.config, collect="steps")
    except InvalidArgumentError:
        return False
    return True


STEPPED = {f"{name} steps": (case, "steps") for name, case in CASES.items() if can_step(case)}
COLLECTED = {name: (case, "episodes") for name, case in CASES.items()} | STEPPED


@pytest.mark.parametrize(("case", "collect"), COLLECTED.values(), ids=COLLECTED)
def test_what_is_saved_where_a_reward_raises_goes_on_to_the_same_curve(
    tmp_path: Path, case: Case, collect: str
) -> None:
    """Whatever the batch that failed had drawn; and a batch is never saved in the midst of its update."""
    judge = Judge()
    small = {"batch_size": 8, "epochs": 2, "minibatches": 2, "collect": collect}
    whole = learn(agent_of(case, **small), 4, total=120)
    first = agent_of(case, task=tiny(reward=judge), **small)
    second = agent_of(case, **small)
    curve = learn(first, 2, total=120)
    judge.fails = True
    with pytest.raises(ZeroDivisionError):
        learn(first, 2, total=120)
    assert first.at_rest
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    assert curve + learn(second, 2, total=120) == whole
    judge.fails = False
    first.load(tmp_path / "checkpoint")  # it forgets the batch that failed
    assert curve + learn(first, 2, total=120) == whole


def test_an_agent_is_not_at_rest_within_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(CASES["ppo"])
    learn(agent, 1)
    step = agent.updater.optimizer.step

    def failing(*args: Any, **kwargs: Any) -> Any:
        step(*args, **kwargs)
        raise MemoryError

    monkeypatch.setattr(agent.updater.optimizer, "step", failing)
    with pytest.raises(MemoryError):
        learn(agent, 1)
    assert not agent.at_rest


def test_the_moving_average_is_of_the_returns_of_the_batches_before(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(CASES["reinforce moving_average"], baseline_decay=0.75)
    expected = 0.0
    seen = []
    advantages = agent.advantages

    def spy(episodes: Episodes, rewards: Tensor) -> tuple[Tensor, Tensor]:
        found, returns = advantages(episodes, rewards)
        seen.append((returns - found)[episodes.response_mask])
        return found, returns

    monkeypatch.setattr(agent, "advantages", spy)
    for metrics in learn(agent, 4):
        taken_off = seen.pop(0)
        torch.testing.assert_close(taken_off, torch.full_like(taken_off, expected), rtol=0, atol=1e-5)
        expected = 0.75 * expected + 0.25 * metrics["rollout/return"]
    assert agent.state()["own"]["average"] == pytest.approx(expected, abs=1e-5)


@every_kind
def test_save_load_and_predict(tmp_path: Path, kind: type[OnPolicyAgent]) -> None:
    case = Case(kind, fields_of(kind, PAIRS))
    agent = agent_of(case)
    other = agent_of(case, seed=1)
    learn(agent, 2)
    agent.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    assert torch.equal(weights(agent), weights(other))
    assert other.num_timesteps == agent.num_timesteps
    observation, _ = agent.envs.reset(seed=5)
    for deterministic in (True, False):
        actions, state = agent.predict(observation, deterministic=deterministic)
        assert np.array_equal(actions, other.predict(observation, deterministic=deterministic)[0])
        assert state is None
    assert actions.shape == (agent.envs.num_envs,)
    agent.envs.step(actions)


# -- groups ----------------------------------------------------------------------------------------------------------


@grouped_kind
def test_an_env_without_groups_is_refused(kind: type[OnPolicyAgent]) -> None:
    config = kind.Config(batch_size=8, group_size=4, policy="mlp")  # type: ignore[call-arg]
    for group in (1, 2):
        envs = RLHFVectorEnv(4, group_size=group, autoreset_mode="SameStep", task=tiny(), device="cpu")
        with pytest.raises(InvalidArgumentError, match=f"`envs` must have group_size=4, got {group}"):
            kind(envs, config)


def test_an_env_with_groups_is_refused_by_an_agent_without() -> None:
    envs = RLHFVectorEnv(4, group_size=4, autoreset_mode="SameStep", task=tiny(), device="cpu")
    with pytest.raises(InvalidArgumentError, match="`envs` must have group_size=1, got 4"):
        PPO(envs, PPO.Config(policy="mlp"))


@grouped_kind
def test_a_batch_holds_each_prompt_as_often_as_a_group_is_large(kind: type[OnPolicyAgent]) -> None:
    agent = agent_of(Case(kind, PAIRS), task=tiny(horizon=6))
    prompts = []
    together = 0
    for _ in range(12):
        episodes = agent.collect()
        agent.num_timesteps += 1
        groups = episodes.prompt_ids.unflatten(0, (-1, 4))
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        prompts += groups[:, 0].tolist()
        together = max(together, len({tuple(ids) for ids in episodes.response_ids[:4].tolist()}))
    assert together > 1  # not one response four times
    assert len({tuple(p) for p in prompts}) == 3


@grouped_kind
def test_a_group_whose_rows_were_stepped_apart_is_refused(kind: type[OnPolicyAgent]) -> None:
    agent = agent_of(Case(kind, PAIRS))
    agent.collect()
    agent.envs.step(np.array([0, 1, 1, 1]))  # the first row ends, and draws its next prompt alone
    with pytest.raises(InvalidArgumentError, match="must give the 4 rows of a group the same prompts .* of 6 groups"):
        agent.learn(agent.num_timesteps + 1)
    agent.envs.reset(seed=5)
    agent.learn(agent.num_timesteps + 1)


def test_responses_to_prompts_that_differ_by_their_length_alone_are_no_group() -> None:
    episodes = agent_of(CASES["rloo"]).collect()
    check_groups(episodes, 4)
    mask = episodes.prompt_mask.clone()
    mask[1, 0] ^= True
    with pytest.raises(InvalidArgumentError, match="in 1 of 6 groups"):
        check_groups(replace(episodes, prompt_mask=mask), 4)


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_without_a_price_grpo_never_asks_the_reference(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_of(Case(GRPO, PAIRS), task=tiny(kl_coef=0.0), kl_estimator=estimator)
    monkeypatch.setattr("agents.algorithms.grpo.read_logits", None)
    (metrics,) = learn(agent, 1)
    assert "train/kl_loss" not in metrics
    assert "rollout/kl" not in metrics


@grouped_kind
def test_groups_are_not_collected_step_by_step(kind: type[OnPolicyAgent]) -> None:
    with pytest.raises(InvalidArgumentError, match="`collect` must be 'episodes'"):
        kind.Config(collect="steps", group_size=2)  # type: ignore[call-arg]


def test_group_advantages_are_of_the_groups_of_a_batch() -> None:
    for kind in (RLOO, GRPO):
        agent = agent_of(Case(kind, PAIRS))
        episodes = agent.collect()
        scores = episodes.scores if kind is GRPO else token_rewards(episodes, 0.4).sum(1)
        found, _ = agent.advantages(episodes, agent.rewards(episodes))
        for i in range(24):
            group = scores[i - i % 4 : i - i % 4 + 4].double()
            others = (group.sum() - scores[i]) / 3
            expected = scores[i] - (others if kind is RLOO else group.mean())
            expected = expected / (group.std() + 1e-4) if kind is GRPO else expected
            n = int(episodes.lengths[i])
            torch.testing.assert_close(found[i, :n], expected.float().expand(n), rtol=1e-4, atol=1e-5)
            assert (found[i, n:] == 0).all()


# -- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (REINFORCE, {"baseline": "median"}, "`baseline` must be one of"),
        (REINFORCE, {"baseline_decay": 1.5}, "`baseline_decay` must be .*<= 1"),
        (REINFORCE, {"vf_coef": -1.0}, "`vf_coef` must be .*>= 0"),
        (A2C, {"gae_lambda": 1.1}, "`gae_lambda` must be .*<= 1"),
        (A2C, {"vf_coef": -0.1}, "`vf_coef` must be .*>= 0"),
        (RLOO, {"group_size": 1}, "`group_size` must be .*>= 2"),
        (RLOO, {"batch_size": 10, "group_size": 4}, "`batch_size` must be a multiple of `group_size`=4, got 10"),
        (GRPO, {"batch_size": 12}, "`batch_size` must be a multiple of `group_size`=8, got 12"),
        (GRPO, {"clip_range": 0.0}, "`clip_range` must be .*> 0"),
        (GRPO, {"kl_estimator": "k4"}, "`kl_estimator` must be one of"),
        (KLQ, {"td_lambda": -0.1}, "`td_lambda` must be .*>= 0"),
        (KLQ, {"epochs": 0}, "`epochs` must be .*>= 1"),
    ],
)
def test_a_bad_config_is_refused(kind: type[OnPolicyAgent], config: dict[str, Any], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        kind.Config(**config)


LEARNERS = ON_POLICY | SUPERVISED
EVERY_CONFIG: list[type[PolicyConfig]] = [kind.Config for kind in LEARNERS.values()]


@pytest.mark.parametrize("kind", EVERY_CONFIG)
def test_every_misspelt_choice_is_refused_with_what_was_meant(kind: type[PolicyConfig]) -> None:
    choices = {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
    assert {"policy", "lr_schedule"} <= choices.keys()
    for name, known in choices.items():
        for choice in known:
            with pytest.raises(UnknownNameError, match=f"`{name}` must be one of .* Did you mean '{choice[0]}"):
                kind(**{name: choice[0] + choice[2:]})  # the second letter is left out


@pytest.mark.parametrize("kind", EVERY_CONFIG)
def test_every_field_refuses_what_is_no_number_or_no_switch(kind: type[PolicyConfig]) -> None:
    numbers: tuple[Any, ...] = (math.nan, math.inf, -1.0, True, "1")
    bad = {float: (None, *numbers), float | None: numbers, int: (None, -1, 1.5, True), bool: (None, 3, "no")}
    hints = {name: hint for name, hint in get_type_hints(kind).items() if hint in bad}
    assert {"lr", "max_grad_norm", "batch_size", "lora_alpha"} <= hints.keys()
    for name, hint in hints.items():
        for value in bad[hint]:
            with pytest.raises(InvalidArgumentError, match=f"`{name}` must be .*got {re.escape(repr(value))}"):
                kind(**{name: value})


@pytest.mark.parametrize("kind", LEARNERS.values(), ids=LEARNERS)
def test_flat_observations_are_refused(kind: Any) -> None:
    config = kind.Config(policy="mlp")
    envs = RLHFVectorEnv(8, group_size=getattr(config, "responses", 1), task=tiny(), device="cpu", obs_format="flat")
    with pytest.raises(InvalidArgumentError, match="`obs_format` must be 'dict', got 'flat'"):
        kind(envs, config)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_another_autoreset_is_refused_where_batches_are_stepped(mode: str) -> None:
    envs = RLHFVectorEnv(8, autoreset_mode=mode, task=tiny(), device="cpu")
    small: dict[str, Any] = {"policy": "mlp", "width": 16, "batch_size": 8, "epochs": 1}
    with pytest.raises(InvalidArgumentError, match=f"`autoreset_mode` must be 'SameStep' .* got '{mode}'"):
        PPO(envs, PPO.Config(**small, collect="steps"))
    assert learn(PPO(envs, PPO.Config(**small)), 1)  # whole episodes do not step the rows


def test_klq_needs_a_price() -> None:
    with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0"):
        agent_of(CASES["klq"], task=tiny(kl_coef=0.0))


def test_klq_needs_a_kl_that_is_part_of_a_states_value() -> None:
    with pytest.raises(InvalidArgumentError, match="`dense_kl` must be True below gamma = 1"):
        agent_of(CASES["klq"], task=tiny(dense_kl=False, gamma=0.9))
    late, dense = (agent_of(CASES["klq"], task=tiny(dense_kl=x)) for x in (False, True))
    assert learn(late, 2)[1]["train/q_loss"] == pytest.approx(learn(dense, 2)[1]["train/q_loss"], rel=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_yaml_is_what_the_agent_does_by_default(name: str) -> None:
    kind = KINDS[name]
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        agent = hydra.compose("train", overrides=[f"agent={name}"]).agent
    values: dict[str, Any] = OmegaConf.to_container(agent)  # type: ignore[assignment]
    assert values.pop("_target_") == f"{kind.__module__}.{kind.__name__}"
    assert validated(kind.Config, values, "agent") == kind.Config()
    assert set(values) == set(kind.Config.__dataclass_fields__)


@pytest.mark.parametrize("config", [{"critic_lr": 1e-3}, {"critic": "reference"}], ids=str)
def test_an_agent_without_a_critic_takes_no_numbers_for_one(config: dict[str, Any]) -> None:
    for name in ("rloo", "grpo", "reinforce mean"):
        with pytest.raises(InvalidArgumentError, match="`critic_lr` null where no values are learned"):
            agent_of(CASES[name], **config)


def test_the_error_of_klqs_q_is_the_advantage() -> None:
    agent = agent_of(CASES["klq"])
    learn(agent, 2)
    episodes = agent.collect()
    advantages, returns = agent.advantages(episodes, agent.rewards(episodes))
    mask = episodes.response_mask
    torch.testing.assert_close((returns - agent.estimates(episodes))[mask], advantages[mask], rtol=0, atol=1e-5)
    assert episodes.values is not None
    assert (agent.estimates(episodes) - episodes.values)[mask].abs().max() > 1e-4


# -- learning --------------------------------------------------------------------------------------------------------


@every_case
def test_every_agent_learns(case: Case) -> None:
    """Two tokens of a task of the suite, graded without sampling: every response is read."""
    # A score divided by its deviation, here a tenth, makes a nat ten times as cheap: GRPO is given a lower price.
    standardised = case.kind is GRPO and case.config.get("scale_by_std", True)
    task = make_task("anchor-0.01" if standardised else "anchor-0.1", max_new_tokens=2)
    tree = Tree.of(task)
    steps = {"epochs": 2, "minibatches": 2} if issubclass(case.kind, (KLQ, PPO)) else {"epochs": 1, "minibatches": 1}
    agent = agent_of(case, task=task, batch_size=64, width=32, lr=1e-2, **steps)
    agent.learn(5000 if case.kind is PCL else 2500)  # PCL takes longer: 0.68 at 2,500
    value = tree.evaluate(lambda episodes: agent.policy.read(episodes).logits).value
    optimum = tree.solve()
    share = normalised(Interval(value, value, value), optimum.reference, optimum.value).mean
    assert 0.6 < share <= 1 + 1e-6, f"{share:.2f} of the gain from {optimum.reference:.3f} to {optimum.value:.3f}"


# -- adding an algorithm ---------------------------------------------------------------------------------------------

TOY = '''
"""The return of the whole response, less the batch's mean."""

from dataclasses import dataclass

import torch

from agents.on_policy import OnPolicyAgent
from agents.on_policy_config import OnPolicyConfig


@dataclass(frozen=True)
class ToyConfig(OnPolicyConfig):
    batch_size: int = 16
    epochs: int = 1
    minibatches: int = 1
    power: float = 1.0


class Toy(OnPolicyAgent):
    Config = ToyConfig

    @property
    def uses_critic(self):
        return False

    def advantages(self, episodes, rewards):
        returns = rewards.sum(1, keepdim=True)
        gain = self.config.power * (returns - returns.mean())
        return torch.where(episodes.response_mask, gain, 0.0), torch.zeros_like(rewards)

    def loss(self, batch):
        loss = -(batch.weights * batch.advantages * batch.log_probs).sum()
        return loss, {"train/policy_loss": loss.detach()}
'''


@pytest.mark.slow
def test_an_algorithm_is_one_file_and_one_yaml_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "agent").mkdir()
    config = {"_target_": "toy.Toy", "policy": "mlp", "width": 16, "power": 2.0}
    (tmp_path / "agent" / "toy.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    run = tmp_path / "run"
    overrides = ["agent=toy", "task=echo-2", "total_timesteps=100", "evaluation.samples=4"]
    where = ["--config-dir", str(tmp_path), "device=cpu", f"hydra.run.dir={run}"]
    monkeypatch.syspath_prepend(tmp_path)
    run_command_here("agents.train", *where, *overrides)
    sys.modules.pop("toy")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["agent"], summary["task"]) == ("Toy", "echo-2")
    assert summary["total_timesteps"] >= 100
    assert summary["after"]["normalised"]["mean"] < 1
    assert abs(summary["after"]["kl"]["mean"]) > 0
    assert "power: 2.0" in (run / "config.yaml").read_text()
