"""Runs that are wrong on purpose: each knob does what it says and no more, and the checks still find what it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from conftest import learn, shifted, table_reward, weights
from shipped import CONF

from agents.algorithms.grpo import GRPO
from agents.algorithms.ppo import PPO
from agents.algorithms.rloo import RLOO
from agents.batch import Batch, recompute
from agents.faults.config import KNOBS, FaultConfig
from agents.faults.make import add_faults
from agents.on_policy import OnPolicyAgent
from agents.runs.plan import check
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import LmGymError
from lmgym.models.causal import CausalLM
from lmgym.models.sampling import Sampler
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.tasks.base import Task


def reference() -> CausalLM:
    """A random table over an EOS and three words."""
    return markov_lm(dirichlet_rows(np.random.default_rng(0), 4, 4, 2.0), ["x", "y", "z"])


TASK = Task(
    name="tiny",
    model=reference,
    reward=table_reward,
    prompts={"train": ["x", "y z", "z z x"]},
    kl_coef=0.4,
    max_new_tokens=4,
)
FAULTS: dict[str, dict[str, Any]] = {
    "staleness": {"staleness": 2},
    "temperature": {"sampler_mismatch": "temperature:1.5"},
    "top_k": {"sampler_mismatch": "top_k:2"},
    "bfloat16": {"sampler_mismatch": "bfloat16"},
    "both": {"staleness": 2, "sampler_mismatch": "top_p:0.7"},
}
OFF_POLICY = ("staleness", "temperature", "top_k", "bfloat16", "both")
every_fault = pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)


def agent_of(kind: type[OnPolicyAgent] = PPO, faults: dict[str, Any] | None = None, **config: Any) -> Any:
    """A small agent that is wrong on purpose."""
    grouped = {"group_size": 4} if kind is not PPO else {}
    made = kind.Config(**{"batch_size": 24, "policy": "mlp", "width": 16, "epochs": 1, **grouped, **config})
    envs = RLHFVectorEnv(made.num_envs, group_size=made.responses, autoreset_mode="SameStep", task=TASK, device="cpu")
    agent = kind(envs, made, seed=shifted())
    add_faults(agent, FaultConfig(**(faults or {})), shifted())
    return agent


def learned_batches(agent: Any, count: int) -> tuple[list[Batch], list[dict[str, Any]], list[dict[str, float]]]:
    """The batches of some updates, the weights of the policy before each, and the metrics."""
    batches: list[Batch] = []
    before: list[dict[str, Any]] = []
    update = agent.update

    def keep(batch: Batch) -> dict[str, float]:
        batches.append(batch)
        before.append({name: x.clone() for name, x in agent.policy.state_dict().items()})
        return update(batch)  # type: ignore[no-any-return]

    agent.update = keep
    metrics = learn(agent, count)
    return batches, before, metrics


def read_again(agent: Any, state: dict[str, Any], sampler: Sampler, episodes: Episodes) -> torch.Tensor:
    """(B, T) log-probs of episodes under some weights, as a sampler draws."""
    agent.policy.load_state_dict(state)
    return recompute(agent.policy, sampler, episodes, 64).log_probs


# -- staleness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True])
def test_batches_are_of_the_policy_of_k_updates_ago(recomputed: bool) -> None:
    agent = agent_of(faults={"staleness": 2}, lr=0.03, recompute_log_probs=recomputed)
    batches, before, metrics = learned_batches(agent, 5)
    for i, batch in enumerate(batches):
        episodes = batch.episodes
        sampled = batch.sampler_log_probs if recomputed else episodes.log_probs
        assert sampled is not None
        old = read_again(agent, before[max(0, i - 2)], Sampler(), episodes)
        new = read_again(agent, before[i], Sampler(), episodes)
        torch.testing.assert_close(sampled, old, atol=1e-5, rtol=0)
        assert ((old - new).abs().max() > 1e-3) == (i > 0)
        assert episodes.values is not None
        torch.testing.assert_close(agent.policy.values(episodes), episodes.values, atol=1e-5, rtol=0)  # of today
        assert (metrics[i]["train/ratio_error"] > 1e-3) == (i > 0 and not recomputed)
        if recomputed:
            torch.testing.assert_close(episodes.log_probs, new, atol=1e-5, rtol=0)
            assert (metrics[i]["train/sampler_gap"] > 1e-3) == (i > 0)
    assert [m["step"] for m in metrics] == np.cumsum([b.episodes.num_tokens for b in batches]).tolist()


# -- a sampler that is not the trainer's -----------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("setting", "sampler"),
    [
        ("temperature:1.5", Sampler(temperature=1.5)),
        ("top_k:2", Sampler(top_k=2)),
        ("top_p:0.7", Sampler(top_p=0.7)),
    ],
)
def test_tokens_are_drawn_from_another_distribution_than_the_trainers(
    setting: str, sampler: Sampler, recomputed: bool
) -> None:
    agent = agent_of(faults={"sampler_mismatch": setting}, recompute_log_probs=recomputed)
    batches, before, metrics = learned_batches(agent, 2)
    for batch, state, row in zip(batches, before, metrics, strict=True):
        sampled = batch.sampler_log_probs if recomputed else batch.episodes.log_probs
        assert sampled is not None
        theirs = read_again(agent, state, sampler, batch.episodes)
        own = read_again(agent, state, Sampler(), batch.episodes)
        torch.testing.assert_close(sampled, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.episodes.log_probs, own if recomputed else theirs, atol=1e-5, rtol=0)
        gap = (theirs - own).abs().sum().item() / batch.episodes.num_tokens
        assert gap > 0.01
        assert row["train/sampler_gap" if recomputed else "train/ratio_error"] == pytest.approx(gap, rel=0.5)
    assert agent.sampler == Sampler()  # what is graded


def test_a_sampler_in_bfloat16_leaves_the_weights_as_they_are() -> None:
    agent = agent_of(faults={"sampler_mismatch": "bfloat16"}, lr=0.03, recompute_log_probs=True)
    learn(agent, 1)
    before = weights(agent).clone()
    episodes = agent.collect()
    assert torch.equal(weights(agent), before)
    gap = agent.shape(episodes).episodes.log_probs - episodes.log_probs
    assert 1e-5 < gap.abs().max() < 0.2
    rounded = agent.policy.next_logits(episodes.prompt_ids[:, -1:], torch.ones(len(episodes), dtype=torch.int64))
    changed = agent.faults.change_sampler(agent.sampler).adjust_logits(rounded.detach(), 0)
    assert torch.equal(changed, rounded.detach().bfloat16().float())


def test_a_mismatch_that_is_none_is_refused() -> None:
    with pytest.raises(LmGymError, match=r"`sampler_mismatch` must be another distribution.*'top_p:1'"):
        agent_of(faults={"sampler_mismatch": "top_p:1"})


# -- the checks ------------------------------------------------------------------------------------------------------


def spoil_log_probs(agent: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Episodes], Episodes]) -> None:
    """Has the sampling give log-probs that are not those of the tokens: a mistake that nobody has asked for."""
    import agents.on_policy

    real = agents.on_policy.collect
    monkeypatch.setattr(agents.on_policy, "collect", lambda *arguments: change(real(*arguments)))


@pytest.mark.parametrize("recomputed", [False, True])
@every_fault
def test_log_probs_that_are_not_of_the_sampling_are_still_found(
    faults: dict[str, Any], recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(faults=faults, recompute_log_probs=recomputed)
    learn(agent, 1)
    spoil_log_probs(agent, monkeypatch, lambda e: replace(e, log_probs=e.log_probs + 0.02 * e.response_mask))
    with pytest.raises(RuntimeError, match="ratio 1"):
        learn(agent, 4)


def test_an_update_that_starts_from_other_log_probs_than_the_trainers_is_still_found() -> None:
    agent = agent_of(faults={"staleness": 1}, recompute_log_probs=True)
    read = agent.read

    def misread(part: Batch, *arguments: Any, **keywords: Any) -> Any:
        minibatch = read(part, *arguments, **keywords)
        return replace(minibatch, old_log_probs=minibatch.old_log_probs - 0.02)

    agent.read = misread
    with pytest.raises(RuntimeError, match="ratio 1"):
        learn(agent, 1)


def test_a_start_that_is_not_the_reference_is_still_found() -> None:
    agent = agent_of(faults={"staleness": 1})
    with torch.no_grad():
        for parameter in agent.policy.policy_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(shifted())))
    with pytest.raises(RuntimeError, match="does not start as the reference"):
        learn(agent, 1)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "faults"),
    [(PPO, FAULTS["both"]), (RLOO, FAULTS["staleness"]), (GRPO, FAULTS["bfloat16"])],
)
def test_a_run_that_goes_on_is_that_of_no_break(
    tmp_path: Path, kind: type[OnPolicyAgent], faults: dict[str, Any]
) -> None:
    config = {"recompute_log_probs": True} if kind is RLOO else {}
    whole = agent_of(kind, faults, **config)
    history = learn(whole, 3, total=400)
    first = agent_of(kind, faults, **config)
    learn(first, 2, total=400)
    first.save(tmp_path / "checkpoint")
    second = agent_of(kind, faults, **config)
    learn(second, 1, total=400)  # a loaded agent forgets what it was
    second.load(tmp_path / "checkpoint")
    assert learn(second, 1, total=400)[0] == history[2]
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize("faults", [{}, dict.fromkeys(KNOBS), {"staleness": 0, "reward_noise": 0, "length_bias": 0.0}])
def test_a_knob_that_is_off_is_no_fault(faults: dict[str, Any]) -> None:
    agent = agent_of(faults=faults)
    assert len(agent.faults) == 0
    assert not [name for name in agent.state() if name.startswith("fault")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["staleness=-1"], r"`staleness` must be an int >= 0, got -1\."),
        (["staleness=1.5"], r"`staleness` must be an int >= 0, got 1\.5\."),
        (["sampler_mismatch=top_q:1"], r"`sampler_mismatch` must be one of .*Did you mean 'top_p'\?"),
        (["sampler_mismatch=top_p"], r"`sampler_mismatch` must be top_p:NUMBER, got 'top_p'\."),
        (["sampler_mismatch=top_p:2"], r"`sampler_mismatch=top_p` must be a finite number > 0 and <= 1, got 2\.0\."),
        (["sampler_mismatch=top_k:2.5"], r"`sampler_mismatch=top_k` must be an int >= 1, got '2\.5'\."),
        (["sampler_mismatch=bfloat16:8"], r"`sampler_mismatch` must be 'bfloat16', got 'bfloat16:8'\."),
        (["agent=sft", "staleness=1"], r"`staleness` must be null for an agent that does not learn from its own"),
        (["agent=sb3_ppo", "sampler_mismatch=bfloat16"], r"`sampler_mismatch` must be null for an agent that does not"),
        (["seeds=2", "staleness=1"], r"`staleness` must be null where `seeds` is above 1"),
    ],
)
def test_wrong_values_are_refused_before_anything_loads(overrides: list[str], message: str) -> None:
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        composed = hydra.compose("train", overrides=["task=echo-4", *overrides])
    with pytest.raises(LmGymError, match=message):
        check(composed)
