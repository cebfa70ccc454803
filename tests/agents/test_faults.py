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
from agents.faults.critic import exact_values, state_noise
from agents.faults.make import add_faults
from agents.on_policy import OnPolicyAgent
from agents.runs.plan import check
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import LmGymError
from lmgym.kl import token_rewards
from lmgym.models.causal import CausalLM
from lmgym.models.sampling import Sampler
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.optimum.exact import make_sampled_logits
from lmgym.optimum.tree import Tree
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
    "copy": {"reference_drift": "copy:2"},
    "length": {"length_bias": 0.1},
}
EVERYTHING = {
    "staleness": 1,
    "sampler_mismatch": "bfloat16",
    "critic_values": "random:0.5",
    "reference_drift": "ema:0.5",
    "reward_noise": 0.5,
    "length_bias": 0.1,
    "overlong": "mask",
}
every_fault = pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)


def agent_of(
    kind: type[OnPolicyAgent] = PPO,
    faults: dict[str, Any] | None = None,
    *,
    horizon: int = 4,
    sampler: Sampler | None = None,
    **config: Any,
) -> Any:
    """A small agent that is wrong on purpose."""
    grouped = {"group_size": 4} if kind is not PPO else {}
    made = kind.Config(**{"batch_size": 24, "policy": "mlp", "width": 16, "epochs": 1, **grouped, **config})
    task = replace(TASK, max_new_tokens=horizon)
    rows = made.num_envs
    envs = RLHFVectorEnv(rows, group_size=made.responses, autoreset_mode="SameStep", task=task, device="cpu")
    agent = kind(envs, made, seed=shifted(), sampler=sampler)
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
    return recompute(agent.policy, sampler, episodes, 64).episodes.log_probs


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


@pytest.mark.parametrize("importance", ["none", "truncated"])
@pytest.mark.parametrize("faults", [{"staleness": 2}, {"sampler_mismatch": "top_k:3"}], ids=["stale", "wider"])
def test_tokens_that_a_truncated_trainer_cannot_draw_are_no_mistake(faults: dict[str, Any], importance: str) -> None:
    agent = agent_of(faults=faults, sampler=Sampler(top_k=2), lr=0.1, recompute_log_probs=True, importance=importance)
    metrics = learn(agent, 4)
    kept = recompute(agent.policy, agent.sampler, agent.collect(), 64)
    assert not kept.is_possible.all()
    assert all(np.isfinite(list(row.values())).all() for row in metrics)


def test_a_mismatch_that_is_none_is_refused() -> None:
    with pytest.raises(LmGymError, match=r"`sampler_mismatch` must be another distribution.*'top_p:1'"):
        agent_of(faults={"sampler_mismatch": "top_p:1"})


# -- a critic that is poor, or perfect -------------------------------------------------------------------------------


def judged_episodes(agent: Any, count: int) -> list[Episodes]:
    """What the advantages of some updates are computed from."""
    found: list[Episodes] = []
    advantages = agent.advantages
    agent.advantages = lambda episodes, rewards: found.append(episodes) or advantages(episodes, rewards)
    learn(agent, count)
    return found


@pytest.mark.parametrize("setting", ["frozen", "random:0.5", "exact"])
def test_advantages_are_of_other_values_and_the_critic_learns_nothing(setting: str) -> None:
    agent = agent_of(faults={"critic_values": setting}, lr=0.03, epochs=2)
    for episodes in judged_episodes(agent, 3):
        assert episodes.values is not None
        assert (episodes.values == 0).all() == (setting == "frozen")
        assert not episodes.values[~episodes.response_mask].any()
    assert not any(p.any() for p in agent.policy.critic_parameters())
    row = learn(agent, 1)[0]
    assert row["train/value_loss"] == 0
    assert row["rollout/exact_kl"] > 1e-3  # the policy learns


def test_exact_values_are_those_of_the_bellman_equation() -> None:
    """From every state the mean TD error under the policy is 0, and the root's value is J."""
    agent = agent_of(lr=0.1)
    learn(agent, 3)
    tree = Tree.of(TASK, "train")
    earned = tree.evaluate(make_sampled_logits(agent.policy, Sampler(), TASK.max_new_tokens))
    values = exact_values(tree, agent, tree.episodes)
    rewards = token_rewards(recompute(agent.policy, Sampler(), tree.episodes, 1024).episodes, TASK.kl_coef).double()
    roots = values[:, 0].view(len(earned.returns), -1)
    torch.testing.assert_close(roots, earned.returns.unsqueeze(1).expand_as(roots), atol=1e-5, rtol=0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    errors = (rewards + after - values) * tree.episodes.response_mask
    mass = earned.log_probs.exp()
    for t in range(TASK.max_new_tokens):
        states = torch.cat([tree.episodes.prompt_ids, tree.episodes.response_ids[:, :t]], dim=1)
        state = states.unique(dim=0, return_inverse=True)[1]
        means = torch.zeros(int(state.max()) + 1, dtype=torch.float64).index_add(0, state, mass * errors[:, t])
        assert means.abs().max() < 1e-5


def test_a_random_critic_is_a_function_of_the_state() -> None:
    agent = agent_of(batch_size=96)
    episodes = agent.collect()
    noise = state_noise(episodes, 3)
    by_state: dict[str, set[float]] = {}
    for i in range(len(episodes)):
        prompt = episodes.prompt_ids[i][episodes.prompt_mask[i]].tolist()
        for t in range(int(episodes.lengths[i])):
            state = str((prompt, episodes.response_ids[i, :t].tolist()))
            by_state.setdefault(state, set()).add(noise[i, t].item())
    assert all(len(values) == 1 for values in by_state.values())
    numbers = torch.tensor([value for values in by_state.values() for value in values])
    assert len(numbers) > 30
    assert len(numbers.unique()) > 0.95 * len(numbers)
    assert 0.6 < numbers.std() < 1.5
    assert not torch.equal(noise, state_noise(episodes, 4))


# -- a reference that drifts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["ema:0.5", "copy:2"])
def test_the_kl_is_paid_to_earlier_weights_and_graded_by_the_reference(setting: str) -> None:
    agent = agent_of(faults={"reference_drift": setting}, lr=0.03)
    truth: list[torch.Tensor] = []
    shape = agent.shape
    agent.shape = lambda episodes, progress: truth.append(episodes.ref_log_probs) or shape(episodes, progress)
    batches, before, metrics = learned_batches(agent, 4)
    own = [name for name, p in agent.policy.named_parameters() if p.requires_grad]
    earlier = before[0]
    for i, batch in enumerate(batches):
        if setting == "ema:0.5" and i:
            earlier = {name: 0.5 * earlier[name] + 0.5 * before[i][name] for name in own}
        elif setting == "copy:2":
            earlier = before[2 * (i // 2)]
        theirs = read_again(agent, {**before[i], **earlier}, Sampler(), batch.episodes)
        torch.testing.assert_close(batch.episodes.ref_log_probs, theirs, atol=1e-5, rtol=0)
        true_kl = (batch.episodes.log_probs - truth[i]).sum(1).mean().item()
        assert metrics[i]["rollout/kl"] == pytest.approx(true_kl, abs=1e-5)
        assert (metrics[i]["train/reference_gap"] > 1e-3) == (i >= (1 if setting == "ema:0.5" else 2))
        assert metrics[i]["train/ratio_error"] < 1e-5


# -- scores, and episodes that are cut -------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [{"reward_noise": 0.5}, {"length_bias": 0.1}])
def test_what_is_learned_from_is_not_the_true_score(faults: dict[str, Any]) -> None:
    agent = agent_of(faults=faults, batch_size=96)
    told = agent.collect()
    learned = agent.shape(told).episodes.scores
    error = learned - told.scores
    if "length_bias" in faults:
        torch.testing.assert_close(error, 0.1 * told.lengths)
    else:
        assert 0.3 < error.std() < 0.7
        assert error.mean().abs() < 0.2
        assert not torch.equal(agent.shape(told).episodes.scores, learned)  # drawn anew
    assert agent_of(batch_size=96).collect().scores.tolist() == told.scores.tolist()
    row = learn(agent, 1)[0]
    assert row["train/learned_score"] != row["rollout/score"]


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_episodes_that_are_cut_are_left_out_after_their_advantages(kind: type[OnPolicyAgent]) -> None:
    agent = agent_of(kind, {"overlong": "mask"}, horizon=2, batch_size=48)
    episodes = agent.collect()
    batch = agent.shape(episodes)
    whole = agent_of(kind, horizon=2, batch_size=48).shape(episodes)
    lengths = episodes.lengths
    ended = torch.tensor([episodes.response_ids[i, lengths[i] - 1].item() == 0 for i in range(len(episodes))])
    assert 0 < ended.sum() < len(episodes)
    assert torch.equal(batch.episodes.response_ids, episodes.response_ids[ended])
    assert torch.equal(batch.advantages, whole.advantages[ended])
    row = learn(agent, 1)[0]
    assert 0 < row["train/overlong_fraction"] < 1


def test_a_filter_that_leaves_nothing_says_so() -> None:
    agent = agent_of(faults={"overlong": "mask"}, horizon=1, minibatches=20)
    with pytest.raises(LmGymError, match=r"`overlong` must be null where the length limit cuts nearly all"):
        learn(agent, 1)


# -- the checks ------------------------------------------------------------------------------------------------------


def spoil_log_probs(agent: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Episodes], Episodes]) -> None:
    """Has the sampling give log-probs that are not those of the tokens: a mistake that nobody has asked for."""
    import agents.on_policy

    real = agents.on_policy.collect
    monkeypatch.setattr(agents.on_policy, "collect", lambda *args, **named: change(real(*args, **named)))


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
    [(PPO, EVERYTHING), (RLOO, FAULTS["staleness"]), (GRPO, FAULTS["copy"])],
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
        (["critic_values=random"], r"`critic_values` must be random:NUMBER, got 'random'\."),
        (
            ["agent=rloo", "critic_values=exact"],
            r"`critic_values` must be null for an agent without a critic",
        ),
        (["agent=klq", "critic_values=exact"], r"`critic_values` must be null for an agent without a critic"),
        (["reference_drift=ema:1"], r"`reference_drift=ema` must be a finite number >= 0 and < 1, got 1\.0\."),
        (["reward_noise=-1"], r"`reward_noise` must be a finite number >= 0, got -1\."),
        (["length_bias=long"], r"`length_bias` must be a finite number"),
        (["overlong=drop"], r"`overlong` must be one of \['mask'\], got 'drop'"),
        (["seeds=2", "staleness=1"], r"`staleness` must be null where `seeds` is above 1"),
    ],
)
def test_wrong_values_are_refused_before_anything_loads(overrides: list[str], message: str) -> None:
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        composed = hydra.compose("train", overrides=["task=echo-4", *overrides])
    with pytest.raises(LmGymError, match=message):
        check(composed)
