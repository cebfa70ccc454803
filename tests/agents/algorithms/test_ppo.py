"""PPO and the loop it stands on, against enumeration of every response of problems small enough for it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gpt2, learn, shifted, weights, word_tokenizer
from torch import Tensor

import agents.on_policy
from agents.algorithms.ppo import PPO, PPOConfig
from agents.batch import Batch, recompute
from agents.diagnostics import exact_kl
from agents.policies.actor_critic import Critic
from agents.update import Loss, lr_factor
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import LmGymError, LogProbError
from lmgym.kl import discounted_return, episode_kl, token_rewards
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.sampling import Sampler
from lmgym.rollout import collect
from lmgym.tasks.base import Task

WORDS = ["a", "b", "c", "d"]  # with <pad>, <eos> and <unk> a vocabulary of 7
PROMPTS = ["a", "b c", "d d a"]


def gaussian(prompts: list[str], completions: list[str], *, completion_ids: Any, **columns: Any) -> list[float]:
    """A reward without structure: a standard normal number for every prompt and response."""
    return [random.Random(f"{p} {list(r)}").gauss(0, 1) for p, r in zip(prompts, completion_ids, strict=True)]


def count_b(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """One point for every b."""
    return [float(completion.split().count("b")) for completion in completions]


def tiny_envs(*, num_envs: int = 1, reward: Any = gaussian, kl_coef: float = 0.3, **task: Any) -> RLHFVectorEnv:
    """The token MDP over a random model of one layer, with at most two tokens a response."""
    tokenizer = word_tokenizer(WORDS)
    model = gpt2(len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=16)
    made = Task(
        name="tiny",
        model=CausalLM(freeze(model), tokenizer),
        reward=reward,
        prompts={"train": PROMPTS},
        kl_coef=kl_coef,
        max_new_tokens=task.pop("max_new_tokens", 2),
        **task,
    )
    return RLHFVectorEnv(num_envs, autoreset_mode="SameStep", task=made, device="cpu", prompt_order="sequential")


def tiny_ppo(envs: RLHFVectorEnv | None = None, *, seed: int = 0, sampler: Sampler | None = None, **config: Any) -> PPO:
    config = {"batch_size": 24, "micro_batch_size": 24, "epochs": 2, "minibatches": 2, "lr": 1e-3} | config
    return PPO(envs or tiny_envs(), PPOConfig(**config), seed=shifted(seed), sampler=sampler)


def one_update(**config: Any) -> dict[str, Any]:
    """A config under which an update is one gradient of the whole batch."""
    return {"epochs": 1, "minibatches": 1, "max_grad_norm": 0.0} | config


def moved(agent: PPO, scale: float = 0.1, seed: int = 3) -> PPO:
    """The agent with every parameter of its policy moved, as in the midst of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    agent.num_timesteps = 1
    return agent


def gradients(agent: PPO) -> Tensor:
    """What the last backward pass left, in one long vector."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in agent.policy.parameters()])


# -- every response there is -----------------------------------------------------------------------------------------


def enumerate_responses(
    model: Any, prompt: tuple[int, ...], horizon: int, eos: int
) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
    """Every response, its log-prob (R,) and all log-probs along it (R, T, V), from plain forwards; differentiable."""
    done: list[tuple[int, ...]] = []
    log_probs: list[Tensor] = []
    distributions: list[Tensor] = []
    growing: list[tuple[int, ...]] = [()]
    log_prob = torch.zeros(1)
    path: Tensor | None = None  # (n, t, V), log-probs along what is growing
    for t in range(horizon):
        ids = torch.tensor([prompt + prefix for prefix in growing])
        log_pi = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].log_softmax(-1)
        total = log_prob[:, None] + log_pi
        path = log_pi[:, None] if path is None else torch.cat([path, log_pi[:, None]], 1)
        tokens = range(log_pi.shape[1])
        ending = [token for token in tokens if token == eos or t == horizon - 1]
        others = [token for token in tokens if token not in ending]
        done += [(*prefix, token) for prefix in growing for token in ending]
        log_probs.append(total[:, ending].flatten())
        padded = torch.nn.functional.pad(path, (0, 0, 0, horizon - t - 1))
        distributions.append(padded.repeat_interleave(len(ending), 0))
        growing = [(*prefix, token) for prefix in growing for token in others]
        log_prob = total[:, others].flatten()
        path = path.repeat_interleave(len(others), 0)
    return done, torch.cat(log_probs), torch.cat(distributions)


class Truth:
    """J, V* and the KL of a policy on the tiny problem, by enumeration."""

    def __init__(self, envs: RLHFVectorEnv) -> None:
        engine = envs.engine
        task = envs.task
        self.kl_coef = task.kl_coef
        self.horizon = task.max_new_tokens
        self.eos = engine.lm.tokenizer.eos_token_id
        self.prompts = [engine.prompts[i].ids for i in range(len(engine.prompts))]
        self.ref = []
        self.scores = []
        with torch.no_grad():
            for prompt, text in zip(self.prompts, PROMPTS, strict=True):
                responses, log_probs, _ = enumerate_responses(engine.lm.model, prompt, self.horizon, self.eos)
                completions = [engine.lm.decode(r) for r in responses]
                scores = engine.reward([text] * len(responses), completions, completion_ids=responses)
                self.ref.append(log_probs)
                self.scores.append(torch.tensor(scores))

    def optimum(self) -> float:
        """V* = kl_coef * log E_ref exp(score / kl_coef), the mean over prompts."""
        price = self.kl_coef
        optima = [price * (r + s / price).logsumexp(0).item() for r, s in zip(self.ref, self.scores, strict=True)]
        return sum(optima) / len(optima)

    def objective(self, model: Any, kl_coef: float | None = None) -> Tensor:
        """J = E[score - kl_coef * log pi / pi_ref], differentiable."""
        price = self.kl_coef if kl_coef is None else kl_coef
        parts = []
        for prompt, ref, scores in zip(self.prompts, self.ref, self.scores, strict=True):
            _, log_probs, _ = enumerate_responses(model, prompt, self.horizon, self.eos)
            parts.append((log_probs.exp() * (scores - price * (log_probs - ref))).sum())
        return torch.stack(parts).mean()

    def kl(self, model: Any) -> float:
        """KL(pi || pi_ref), nats an episode."""
        with torch.no_grad():
            parts = []
            for prompt, ref in zip(self.prompts, self.ref, strict=True):
                _, log_probs, _ = enumerate_responses(model, prompt, self.horizon, self.eos)
                parts.append((log_probs.exp() * (log_probs - ref)).sum())
            return torch.stack(parts).mean().item()


def test_the_enumeration_is_whole() -> None:
    truth = Truth(tiny_envs())
    for log_probs in truth.ref:
        assert len(log_probs) == 1 + 6 * 7
        assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


# -- the first update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["shared", "reference", "reward_model"])
def test_at_first_the_kl_is_zero_and_the_ratio_one(parts: dict[str, object], critic: Critic) -> None:
    agent = tiny_ppo(RLHFVectorEnv(1, **parts), critic=critic, **one_update())
    (first,) = learn(agent, 1)
    assert abs(first["rollout/kl"]) < 1e-4
    assert abs(first["rollout/exact_kl"]) < 1e-4
    assert first["rollout/return"] == pytest.approx(first["rollout/score"], abs=1e-4)
    assert first["train/ratio_error"] < 1e-5
    assert first["train/clip_fraction"] == 0
    assert abs(first["train/approx_kl"]) < 1e-6
    assert 0 < first["train/entropy"] < math.log(agent.envs.engine.lm.vocab_size)
    (second,) = learn(agent, 1)
    assert second["train/ratio_error"] < 1e-5  # of every batch, not only of the first
    assert second["rollout/exact_kl"] > 0


@pytest.mark.parametrize(
    "sampler", [Sampler(temperature=0.7), Sampler(top_k=3), Sampler(top_p=0.8), Sampler(greedy_tokens=1)]
)
def test_the_update_is_of_the_distribution_that_sampled(sampler: Sampler) -> None:
    agent = tiny_ppo(sampler=sampler, entropy_coef=0.01, **one_update())
    for metrics in learn(agent, 2):
        assert metrics["train/ratio_error"] < 1e-5
    assert weights(agent).isfinite().all()


@pytest.mark.parametrize(
    ("sampled", "updated"),
    [
        (Sampler(temperature=0.7), Sampler()),
        (Sampler(), Sampler(temperature=0.7)),
        (Sampler(top_p=0.5), Sampler()),
        (Sampler(top_k=2), Sampler()),
        (Sampler(greedy_tokens=1), Sampler()),
    ],
)
def test_a_forgotten_temperature_is_loud(sampled: Sampler, updated: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(envs: Any, policy: Any, episodes: int, sampler: Sampler, *others: Any, **named: Any) -> Episodes:
        return collect(envs, policy, episodes, sampled, *others, **named)

    monkeypatch.setattr(agents.on_policy, "collect", other)
    with pytest.raises((RuntimeError, LogProbError), match=r"not of the distribution that sampled|must have KL 0"):
        learn(moved(tiny_ppo(sampler=updated)), 1)


def test_a_policy_that_does_not_start_as_the_reference_is_loud() -> None:
    agent = moved(tiny_ppo(), scale=0.01)
    agent.num_timesteps = 0
    with pytest.raises(RuntimeError, match="does not start as the reference"):
        learn(agent, 1)


def test_log_probs_of_a_stale_policy_are_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tiny_ppo()

    def stale(*args: Any, **named: Any) -> Episodes:
        episodes = collect(*args, **named)
        moved(agent)
        return episodes

    monkeypatch.setattr(agents.on_policy, "collect", stale)
    with pytest.raises(RuntimeError, match="ratio 1"):
        learn(agent, 1)


# -- what must not change the result ---------------------------------------------------------------------------------


def batch_of(agent: PPO, seed: int = 5) -> Episodes:
    episodes = collect(agent.envs, agent.policy, agent.config.batch_size, None, torch.Generator().manual_seed(seed))
    assert len(set(episodes.lengths.tolist())) > 1  # ragged
    return episodes


def longer() -> RLHFVectorEnv:
    return tiny_envs(max_new_tokens=6)


def updated(episodes: Episodes, **config: Any) -> tuple[Tensor, Tensor]:
    """Gradients and parameters after an update on given episodes."""
    agent = moved(tiny_ppo(longer(), **one_update(**config)))
    agent.learn_from(agent.shape(episodes))
    return gradients(agent), weights(agent)


@pytest.fixture(scope="module")
def ragged_batch() -> Episodes:
    return batch_of(moved(tiny_ppo(longer())))


@pytest.mark.parametrize("micro_batch_size", [1, 5, 23])
def test_accumulating_gradients_does_not_change_them(ragged_batch: Episodes, micro_batch_size: int) -> None:
    whole = updated(ragged_batch)
    parts = updated(ragged_batch, micro_batch_size=micro_batch_size)
    assert whole[0].norm() > 0.01
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_order_of_a_batch_does_not_matter(ragged_batch: Episodes) -> None:
    order = torch.randperm(len(ragged_batch), generator=torch.Generator().manual_seed(1))
    for a, b in zip(updated(ragged_batch), updated(ragged_batch[order]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_padding_does_not_matter(ragged_batch: Episodes) -> None:
    b = len(ragged_batch)

    def wide(x: Tensor, left: int, right: int, fill: float) -> Tensor:
        return torch.nn.functional.pad(x, (left, right), value=fill)

    assert ragged_batch.values is not None
    padded = replace(
        ragged_batch,
        prompt_ids=wide(ragged_batch.prompt_ids, 3, 0, 4),
        prompt_mask=wide(ragged_batch.prompt_mask, 3, 0, False),
        response_ids=wide(ragged_batch.response_ids, 0, 5, 3),
        response_mask=wide(ragged_batch.response_mask, 0, 5, False),
        log_probs=wide(ragged_batch.log_probs, 0, 5, 0),
        ref_log_probs=wide(ragged_batch.ref_log_probs, 0, 5, 0),
        values=wide(ragged_batch.values, 0, 5, 0),
    )
    assert padded.response_ids.shape == (b, 11)
    for one, other in zip(updated(ragged_batch), updated(padded), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_every_episode_is_used_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tiny_ppo(epochs=3, minibatches=5, micro_batch_size=2)
    seen = []
    losses = agent.losses

    def spy(minibatch: Batch) -> Iterator[Loss]:
        seen.append(minibatch.advantages[:, 0].long().tolist())
        return losses(minibatch)

    numbered = torch.arange(24.0).unsqueeze(1).expand(24, agent.envs.engine.horizon)
    monkeypatch.setattr(agent, "advantages", lambda episodes, rewards: (numbered, numbered))
    monkeypatch.setattr(agent, "losses", spy)
    learn(agent, 1)
    assert len(seen) == 15
    epochs = [list(itertools.chain(*seen[i : i + 5])) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # shuffled anew


def test_the_weights_of_a_minibatch_sum_to_one(ragged_batch: Episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = moved(tiny_ppo(longer(), epochs=1, minibatches=3, micro_batch_size=3))
    sums = []
    loss = agent.loss
    monkeypatch.setattr(agent, "loss", lambda batch: (sums.append(batch.weights.sum().item()), loss(batch))[1])
    agent.learn_from(agent.shape(ragged_batch))
    assert len(sums) == 9  # 3 minibatches of 8 episodes, 3 + 3 + 2 at a time
    assert [sum(sums[i : i + 3]) for i in (0, 3, 6)] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("kind", ["episodes", "steps"])
def test_one_seed_gives_one_curve_to_the_last_bit(kind: str) -> None:
    runs = [learn(tiny_ppo(tiny_envs(num_envs=24), collect=kind, kl_controller="adaptive"), 4) for _ in range(2)]
    assert runs[0] == runs[1]
    other = learn(tiny_ppo(tiny_envs(num_envs=24), collect=kind, kl_controller="adaptive", seed=1), 4)
    assert other != runs[0]


def test_a_second_agent_and_global_generators_do_not_disturb_the_first() -> None:
    alone = learn(tiny_ppo(), 3)
    state = torch.get_rng_state()
    first = tiny_ppo()
    second = tiny_ppo(seed=7)
    together = []
    for _ in range(3):
        together += learn(first, 1)
        learn(second, 1)
        torch.rand(3)
    torch.set_rng_state(state)
    assert together == alone


@pytest.mark.parametrize(("kind", "shared"), [("episodes", False), ("steps", True)])
def test_an_interrupted_run_goes_on_to_the_same_curve(tmp_path: Any, kind: str, shared: bool) -> None:
    def agent() -> PPO:
        critic: Critic = "shared" if shared else "reference"
        return tiny_ppo(tiny_envs(num_envs=24), collect=kind, critic=critic, kl_controller="adaptive", kl_horizon=100.0)

    def same(curve: list[dict[str, float]]) -> Any:
        # The step path keeps the reference's cache from batch to batch: a new process begins another, which rounds
        # differently.
        return curve if kind == "episodes" else [pytest.approx(metrics, rel=1e-3, abs=1e-4) for metrics in curve]

    whole = learn(agent(), 5, total=400)
    first = agent()
    second = agent()
    curve = learn(first, 2, total=400)
    first.save(tmp_path / "checkpoint")
    learn(first, 1, total=400)  # what comes after the checkpoint is lost with the process
    learn(second, 1, total=400)  # and a loaded agent forgets what it was
    second.load(tmp_path / "checkpoint")
    assert curve + learn(second, 3, total=400) == same(whole)
    assert whole[0]["train/lr"] > whole[-1]["train/lr"]


@pytest.mark.parametrize("order", ["sequential", "shuffle"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_both_ways_of_collecting_give_the_same_first_batch(parts: dict[str, object], order: str, gamma: float) -> None:
    batches = []
    for kind in ("episodes", "steps"):
        envs = RLHFVectorEnv(12, autoreset_mode="SameStep", prompt_order=order, gamma=gamma, **parts)
        batches.append(tiny_ppo(envs, seed=2, batch_size=12, collect=kind).collect())
    fast, slow = batches
    for name in ("prompt_ids", "prompt_mask", "response_mask", "terminated"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    mask = fast.response_mask
    assert torch.equal(fast.response_ids[mask], slow.response_ids[mask])
    for name in ("log_probs", "ref_log_probs", "values", "scores"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=0, atol=1e-5, msg=name)
    assert len(set(fast.lengths.tolist())) > 1


# -- what the update is ----------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.slow
def test_the_update_follows_the_exact_gradient_of_the_objective() -> None:
    envs = tiny_envs(kl_coef=0.5)
    config = one_update(batch_size=12_000, micro_batch_size=12_000, gae_lambda=1.0, vf_coef=0.0)
    agent = moved(tiny_ppo(envs, whiten_advantages="none", **config), scale=0.3)
    torch.nn.init.zeros_(agent.policy.value_head.weight)
    torch.nn.init.zeros_(agent.policy.value_head.bias)
    truth = Truth(envs)
    actor = agent.policy.actor
    assert truth.kl(actor) > 0.05

    def exact(kl_coef: float) -> Tensor:
        found = torch.autograd.grad(truth.objective(actor, kl_coef), list(actor.parameters()))
        return torch.cat([g.flatten() for g in found])

    right = exact(0.5)
    wrong = exact(-0.5)
    none = exact(0.0)
    episodes = agent.collect()
    agent.learn_from(agent.shape(episodes))
    # The loss is a mean over tokens, J one over episodes.
    got = -gradients(agent)[: len(right)] * episodes.num_tokens / len(episodes)
    assert cosine(got, right) > 0.99
    assert got.norm().item() == pytest.approx(right.norm().item(), rel=0.1)
    # The KL is not lost in the noise: its sign shows, and so does leaving it out.
    assert cosine(got, wrong) < 0.8
    assert cosine(got, none) < cosine(got, right) - 0.02


def test_whitening_keeps_the_direction_of_the_gradient() -> None:
    envs = tiny_envs(kl_coef=0.0)
    config = one_update(batch_size=12_000, micro_batch_size=12_000, gae_lambda=1.0, vf_coef=0.0)
    agent = moved(tiny_ppo(envs, whiten_advantages="batch", **config), scale=0.3)
    actor = agent.policy.actor
    found = torch.autograd.grad(Truth(envs).objective(actor), list(actor.parameters()))
    right = torch.cat([g.flatten() for g in found])
    agent.learn_from(agent.shape(agent.collect()))
    assert cosine(-gradients(agent)[: len(right)], right) > 0.95


def test_exact_kl_is_the_kl_by_enumeration() -> None:
    envs = tiny_envs()
    agent = moved(tiny_ppo(envs, batch_size=6000), scale=0.3)
    truth = Truth(envs)
    episodes = agent.collect()
    exact = exact_kl(agent.policy, agent.sampler, envs.engine.lm, episodes)
    sampled = episode_kl(episodes)
    expected = truth.kl(agent.policy.actor)
    error = sampled.std().item() / 6000**0.5
    # k1 scatters more than its expectation over the vocabulary, so its error bounds both.
    assert abs(exact - expected) < 3 * error
    assert abs(sampled.mean().item() - expected) < 4 * error
    assert expected > 20 * error


def test_rollout_metrics_are_rebuilt_from_the_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = moved(tiny_ppo(tiny_envs(max_new_tokens=6, gamma=0.9), batch_size=32))
    kept: list[Episodes] = []
    gather = agent.collect
    monkeypatch.setattr(agent, "collect", lambda: kept.append(gather()) or kept[-1])
    (metrics,) = learn(agent, 1)
    (e,) = kept
    returns = []
    kls = []
    lengths = []
    eos = []
    for i in range(32):
        n = int(e.response_mask[i].sum())
        log_ratio = (e.log_probs[i, :n] - e.ref_log_probs[i, :n]).tolist()
        rewards = [-0.3 * x for x in log_ratio]
        rewards[-1] += e.scores[i].item()
        returns.append(sum(0.9**t * r for t, r in enumerate(rewards)))
        kls.append(sum(log_ratio))
        lengths.append(n)
        eos.append(e.response_ids[i, n - 1].item() == 1)
    assert metrics["rollout/return"] == pytest.approx(np.mean(returns), abs=1e-5)
    assert metrics["rollout/score"] == pytest.approx(e.scores.mean().item(), abs=1e-5)
    assert metrics["rollout/kl"] == pytest.approx(np.mean(kls), abs=1e-5)
    assert metrics["rollout/length"] == pytest.approx(np.mean(lengths), abs=1e-5)
    assert metrics["rollout/eos_fraction"] == pytest.approx(np.mean(eos), abs=1e-5)
    assert metrics["step"] == 1 + sum(lengths)


# -- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "rises"), [(1e-6, True), (1e6, False)])
def test_the_adaptive_coefficient_follows_the_kl_that_was_measured(target: float, rises: bool) -> None:
    agent = tiny_ppo(lr=5e-3, kl_controller="adaptive", kl_target=target, kl_horizon=100.0)
    expected = 0.3
    for metrics in learn(agent, 5):
        assert metrics["train/kl_coef"] == pytest.approx(expected, rel=1e-12)
        paid = metrics["rollout/score"] - expected * metrics["rollout/kl"]
        assert metrics["rollout/return"] == pytest.approx(paid, abs=1e-5)  # the coefficient of now, not of the start
        error = min(max(metrics["rollout/kl"] / target - 1, -0.2), 0.2)
        expected *= 1 + error * 24 / 100
    assert agent.kl.value == pytest.approx(expected, rel=1e-12)
    assert (agent.kl.value > 0.3) == rises


def test_an_adaptive_coefficient_needs_a_price_to_start_from() -> None:
    with pytest.raises(LmGymError, match="`kl_coef` must be > 0"):
        tiny_ppo(tiny_envs(kl_coef=0.0), kl_controller="adaptive")


def test_target_kl_leaves_a_batch_early() -> None:
    free = learn(tiny_ppo(lr=0.02, epochs=10, target_kl=None), 1)[0]
    assert free["train/updates"] == 20
    assert free["train/approx_kl"] > 0.01
    held = learn(tiny_ppo(lr=0.02, epochs=10, target_kl=1e-4), 1)[0]
    assert 1 < held["train/updates"] < 20  # the first update has ratio 1, so it never stops there
    patient = learn(tiny_ppo(lr=0.02, epochs=10, target_kl=1e6), 1)[0]
    assert patient == free


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda x: 1.0),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: 0.5 * (1 + math.cos(math.pi * x))),
    ],
)
def test_learning_rate_schedules(schedule: str, factor: Any) -> None:
    history = learn(tiny_ppo(lr=3e-3, lr_schedule=schedule), 100, total=300)
    starts = [0, *(metrics["step"] for metrics in history[:-1])]
    for start, metrics in zip(starts, history, strict=True):
        assert metrics["train/lr"] == pytest.approx(3e-3 * factor(start / 300))
    assert history[-1]["step"] >= 300 > starts[-1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_then_follows_its_schedule_over_what_is_left(schedule: str) -> None:
    assert [lr_factor(schedule, x, 0.2, 0.1) for x in (0.0, 0.05, 0.1)] == pytest.approx([0.0, 0.25, 0.5])
    for left in (0.0, 0.3, 1.0):
        falling = lr_factor(schedule, left)
        expected = falling if schedule == "constant" else 0.1 + 0.9 * falling
        assert lr_factor(schedule, 0.2 + 0.8 * left, 0.2, 0.1) == pytest.approx(expected)
    assert lr_factor(schedule, 0.7, 1.0) == pytest.approx(0.7)


def test_a_batch_that_begins_in_the_warm_up_has_the_rate_of_its_end() -> None:
    history = learn(tiny_ppo(lr=3e-3, lr_schedule="constant", lr_warmup=0.5), 100, total=300)
    for metrics in history:
        assert metrics["train/lr"] == pytest.approx(3e-3 * min(1.0, metrics["step"] / 150))
    assert history[0]["train/lr"] > 0


def test_a_checkpoint_does_not_bring_its_rates_along(tmp_path: Any) -> None:
    old = tiny_ppo(lr=1e-3, adam_eps=1e-3)
    new = tiny_ppo(lr=1e-4, critic_lr=3e-4, adam_eps=1e-6)
    learn(old, 1)
    old.save(tmp_path / "checkpoint")
    new.load(tmp_path / "checkpoint")
    new.updater.set_lr(0.0, 0.1)
    assert [(g["lr"], g["eps"]) for g in new.updater.optimizer.param_groups] == [(1e-4, 1e-6), (3e-4, 1e-6)]


def test_the_critic_has_a_rate_of_its_own(ragged_batch: Episodes) -> None:
    for config in ({}, {"critic": "reference"}):
        agent = moved(tiny_ppo(longer(), lr=1e-3, critic_lr=0.0, lr_schedule="constant", **config))
        before = {name: p.clone() for name, p in agent.policy.named_parameters()}
        agent.updater.set_lr(0.0, 0.1)
        agent.learn_from(agent.shape(ragged_batch))
        still = {name for name, p in agent.policy.named_parameters() if torch.equal(p, before[name])}
        assert still == {name for name in before if name.startswith(("value_head.", "critic."))}


@pytest.mark.parametrize("style", ["pytorch", "tensorflow"])
def test_adam_is_that_of_the_library_it_is_named_after(style: str) -> None:
    """Written out from the documentation of each: they differ in where epsilon stands."""
    beta1 = 0.8
    beta2 = 0.95
    eps = 1e-3
    lr = 1e-2
    shape = {"adam": style, "adam_beta1": beta1, "adam_beta2": beta2, "adam_eps": eps, "lr": lr}
    agent = moved(tiny_ppo(longer(), **one_update(lr_schedule="constant", **shape)))
    expected = weights(agent).double()
    m = 0.0
    v = 0.0
    for t in (1, 2, 3):
        agent.learn_from(agent.shape(batch_of(agent, seed=t)))
        g = gradients(agent).double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        root = (1 - beta2**t) ** 0.5
        if style == "tensorflow":
            expected = expected - lr * root / (1 - beta1**t) * m / (v**0.5 + eps)
        else:
            expected = expected - lr / (1 - beta1**t) * m / (v**0.5 / root + eps)
        torch.testing.assert_close(weights(agent).double(), expected, rtol=0, atol=1e-6)


def test_scores_are_clipped_before_they_are_learned_from_and_reported_whole(ragged_batch: Episodes) -> None:
    clipped = replace(ragged_batch, scores=ragged_batch.scores.clamp(-0.1, 0.1))
    assert not torch.equal(clipped.scores, ragged_batch.scores)
    whole = updated(ragged_batch)
    by_hand = updated(clipped)
    assert torch.equal(updated(ragged_batch, score_clip=0.1)[0], by_hand[0])
    assert not torch.allclose(whole[0], by_hand[0], atol=1e-4)
    assert learn(tiny_ppo(score_clip=1e-3), 1)[0]["rollout/score"] == learn(tiny_ppo(), 1)[0]["rollout/score"]


def test_rewards_are_whitened_around_their_mean(ragged_batch: Episodes) -> None:
    agent = tiny_ppo(longer(), whiten_rewards=True)
    mask = ragged_batch.response_mask
    plain = tiny_ppo(longer()).rewards(ragged_batch)[mask]
    scaled = agent.rewards(ragged_batch)[mask]
    torch.testing.assert_close(scaled, (plain - plain.mean()) / plain.std(correction=0) + plain.mean())


def test_advantages_are_whitened_over_what_is_said(ragged_batch: Episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(choice: str) -> list[Tensor]:
        """Advantages of each of two minibatches, whose tokens come in micro-batches of five episodes."""
        agent = moved(tiny_ppo(longer(), epochs=1, minibatches=2, micro_batch_size=5, whiten_advantages=choice))
        parts: list[Tensor] = []
        loss = agent.loss
        monkeypatch.setattr(agent, "loss", lambda batch: (parts.append(batch.advantages), loss(batch))[1])
        agent.learn_from(agent.shape(ragged_batch))
        return [torch.cat(parts[i : i + 3]) for i in (0, 3)]

    for x in seen("minibatch"):
        assert (x.mean().item(), x.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-4)
    batch = seen("batch")
    assert torch.cat(batch).std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert batch[0].std(correction=0).item() != pytest.approx(1, abs=1e-2)
    plain = torch.cat(seen("none"))
    torch.testing.assert_close(torch.cat(batch), (plain - plain.mean()) / plain.std(correction=0), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_mean_over_episodes_weighs_them_alike(ragged_batch: Episodes) -> None:
    """The gradient of the mean over episodes is the mean of the gradients of each alone."""
    config = {"whiten_advantages": "none", "vf_coef": 0.7}
    whole = updated(ragged_batch, loss_mean="episode", **config)[0]
    alone = [updated(ragged_batch[i : i + 1], **config)[0] for i in range(len(ragged_batch))]
    torch.testing.assert_close(whole, torch.stack(alone).mean(0), rtol=0, atol=1e-5)
    assert not torch.allclose(whole, updated(ragged_batch, **config)[0], atol=1e-3)


def test_log_probs_can_be_those_of_the_training_forward(ragged_batch: Episodes) -> None:
    """Rounding of the sampling is taken off; a distribution that is another one is loud all the same."""
    mask = ragged_batch.response_mask
    rounded = replace(ragged_batch, log_probs=ragged_batch.log_probs + 5e-4 * mask)
    for a, b in zip(updated(rounded, recompute_log_probs=True), updated(ragged_batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(
        updated(rounded, whiten_advantages="none")[0], updated(ragged_batch, whiten_advantages="none")[0], atol=1e-4
    )
    with pytest.raises(RuntimeError, match="ratio 1"):
        updated(replace(ragged_batch, log_probs=ragged_batch.log_probs - 0.5 * mask), recompute_log_probs=True)


def test_a_token_on_the_edge_of_a_truncated_distribution_keeps_the_log_prob_it_was_drawn_with() -> None:
    agent = moved(tiny_ppo(longer(), sampler=Sampler(top_k=2), recompute_log_probs=True))
    episodes = agent.collect()
    last = episodes.lengths[0] - 1
    position = int(episodes.response_mask[0].sum()) - 1
    off = agent.policy.read(episodes).logits[position].argmin()  # never among the two likeliest
    ids = episodes.response_ids.clone()
    ids[0, last] = off
    found, is_possible = recompute(agent.policy, agent.sampler, replace(episodes, response_ids=ids), 24)
    assert (~is_possible).nonzero().tolist() == [[0, int(last)]]
    assert found.log_probs[0, last] == episodes.log_probs[0, last]
    torch.testing.assert_close(found.log_probs, episodes.log_probs, rtol=0, atol=1e-5)


def test_texts_are_mixed_in(tmp_path: Any) -> None:
    """The loss is -log p of every token but the first, the end included; a long text is cut into pieces."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "a b c d a b c d"}\n')
    config = {"ptx_coef": 0.5, "ptx_texts": str(path), "ptx_batch_size": 64}
    agent = moved(tiny_ppo(**config))
    lm = agent.envs.engine.lm
    room = agent.envs.engine.width + agent.envs.engine.horizon
    end = lm.tokenizer.eos_token_id
    long = [*lm.encode("a b c d a b c d"), end]
    assert agent._texts == [
        [*lm.encode("a b"), end],
        *(p for i in range(0, 9, room) if len(p := long[i : i + room]) > 1),
    ]
    spent = agent.tokens.backward
    state = agent.generator.get_state()
    loss, metrics = agent.text_loss()
    drawn = torch.randint(len(agent._texts), (64,), generator=torch.Generator().set_state(state))
    terms = []
    for i in drawn.tolist():
        ids = torch.tensor([agent._texts[i]])
        log_pi = agent.policy.actor(input_ids=ids).logits.log_softmax(-1)
        terms += [-log_pi[0, t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1)]
    assert metrics["train/ptx_loss"].item() == pytest.approx(float(np.mean(terms)), abs=1e-5)
    assert loss.item() == pytest.approx(0.5 * float(np.mean(terms)), abs=1e-5)
    assert agent.tokens.backward - spent == sum(len(agent._texts[i]) for i in drawn)


def test_mixed_in_texts_stay_likely(tmp_path: Any) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("a b c\n")
    mixed, plain = (
        learn(tiny_ppo(lr=1e-2, **config), 12) for config in ({"ptx_coef": 1.0, "ptx_texts": str(path)}, {})
    )
    assert mixed[-1]["train/ptx_loss"] < mixed[0]["train/ptx_loss"] - 0.3
    assert "train/ptx_loss" not in plain[0]


def test_texts_that_teach_nothing_are_refused(tmp_path: Any) -> None:
    (tmp_path / "texts.txt").write_text("a\n")
    envs = tiny_envs()
    envs.engine.lm.tokenizer = word_tokenizer(WORDS)
    envs.engine.lm.tokenizer.eos_token = None
    with pytest.raises(LmGymError, match=r"`ptx_texts` must hold a text of two tokens or more, and .* has none"):
        tiny_ppo(envs, ptx_coef=1.0, ptx_texts=str(tmp_path / "texts.txt"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ptx_coef": 1.0}, "`ptx_texts` must be a file where `ptx_coef` is above 0, got None"),
        ({"ptx_texts": "x.txt"}, "`ptx_texts` must be null where `ptx_coef` is 0, got 'x.txt'"),
        ({"ptx_coef": 1.0, "ptx_texts": "/no/such.txt"}, "there is no file '/no/such.txt'"),
        ({"dual_clip": 1.0}, "`dual_clip` must be"),
        ({"loss_mean": "tokens"}, "`loss_mean` must be"),
        ({"whiten_advantages": True}, "`whiten_advantages` must be"),
        ({"lr_end": 1.5}, "`lr_end` must be"),
        ({"adam_beta2": 1.0}, "`adam_beta2` must be a finite number >= 0 and < 1, got 1.0"),
        ({"score_clip": 0.0}, "`score_clip` must be"),
    ],
)
def test_numbers_that_cannot_be_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        PPOConfig(**config)


def test_tokens_are_counted(ragged_batch: Episodes) -> None:
    """Two epochs are two forwards and two backwards over the batch; recomputed log-probs are one forward more."""
    size = ragged_batch.num_prompt_tokens + ragged_batch.num_tokens
    assert size == int(ragged_batch.prompt_mask.sum() + ragged_batch.lengths.sum())
    for config, forward in (({}, 2), ({"recompute_log_probs": True}, 3)):
        agent = moved(tiny_ppo(longer(), epochs=2, minibatches=3, micro_batch_size=3, **config))
        agent.learn_from(agent.shape(ragged_batch))
        assert (agent.tokens.forward, agent.tokens.backward) == (forward * size, 2 * size)
    metrics = learn(tiny_ppo(), 2)[-1]
    assert metrics["cost/forward_tokens"] > metrics["cost/backward_tokens"] > metrics["step"]


def test_gradients_are_clipped_to_their_norm(ragged_batch: Episodes) -> None:
    free, _ = updated(ragged_batch)
    held, _ = updated(ragged_batch, max_grad_norm=0.01)
    assert held.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert cosine(free, held) > 1 - 1e-6


def test_terms_of_the_loss_are_weighted(ragged_batch: Episodes) -> None:
    def grad(**config: Any) -> Tensor:
        return updated(ragged_batch, **config)[0]

    policy = grad(vf_coef=0.0)
    value = grad(vf_coef=1.0) - policy
    entropy = grad(vf_coef=0.0, entropy_coef=1.0) - policy
    both = policy + 0.3 * value + 0.7 * entropy
    torch.testing.assert_close(grad(vf_coef=0.3, entropy_coef=0.7), both, rtol=0, atol=1e-5)
    assert min(x.norm().item() for x in (policy, value, entropy)) > 1e-3


def test_an_entropy_bonus_raises_entropy() -> None:
    low, high = (
        learn(tiny_ppo(batch_size=128, micro_batch_size=128, lr=5e-3, entropy_coef=x), 8)[-1]["train/entropy"]
        for x in (0.0, 1.0)
    )
    assert high > low + 0.3


def test_the_critic_learns_what_is_paid() -> None:
    envs = tiny_envs(reward=lambda prompts, completions, **_: [3.0] * len(prompts), kl_coef=0.0)
    agent = tiny_ppo(envs, lr=2e-2, lr_schedule="constant", clip_range_value=None, vf_coef=1.0)
    history = learn(agent, 40)
    assert history[0]["train/value_loss"] > 1.0
    episodes = agent.collect()
    assert (agent.policy.values(episodes)[episodes.response_mask] - 3.0).abs().max() < 0.3


# -- variants of the problem -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        {"truncate": True},
        {"gamma": 0.9},
        {"dense_kl": False},
        {"gamma": 0.9, "truncate": True, "dense_kl": False},
        {"kl_coef": 0.0},
        {"missing_eos_penalty": 1.0, "min_new_tokens": 1},
    ],
    ids=str,
)
def test_every_variant_of_the_problem_trains(variant: dict[str, Any]) -> None:
    """Step by step; `tests/agents/test_agents.py` has them by whole episodes."""
    agent = tiny_ppo(tiny_envs(num_envs=24, max_new_tokens=4, **variant), collect="steps")
    before = weights(agent)
    history = learn(agent, 3)
    assert all(math.isfinite(x) for metrics in history for x in metrics.values())
    assert ("rollout/kl" in history[0]) == (variant.get("kl_coef") != 0.0)
    assert not torch.equal(weights(agent), before)


def test_paying_the_kl_at_the_end_gives_the_same_return() -> None:
    dense, late = (learn(moved(tiny_ppo(tiny_envs(max_new_tokens=4, dense_kl=x))), 1)[0] for x in (True, False))
    for name in ("rollout/return", "rollout/kl", "rollout/score"):
        assert dense[name] == pytest.approx(late[name], abs=1e-5)
    assert dense["rollout/return"] != pytest.approx(dense["rollout/score"], abs=1e-3)


def test_truncated_episodes_are_bootstrapped_with_the_value_behind_them_and_terminated_ones_are_not() -> None:
    config = {"gae_lambda": 1.0, "whiten_advantages": "none", "batch_size": 64}
    agent = moved(tiny_ppo(tiny_envs(max_new_tokens=4, gamma=0.9, truncate=True), **config))
    with torch.no_grad():
        agent.policy.value_head.bias.fill_(5.0)  # far from zero, so that it cannot be overlooked
    episodes = agent.collect()
    rewards = token_rewards(episodes, 0.3)
    _, returns = agent.advantages(episodes, rewards)
    after = agent.policy.next_values(episodes)
    expected = discounted_return(rewards, 0.9) + torch.where(
        episodes.terminated, 0.0, 0.9 ** episodes.lengths.float() * after
    )
    torch.testing.assert_close(returns[:, 0], expected, rtol=0, atol=1e-4)
    assert 0 < episodes.terminated.sum() < 64
    eos = episodes.response_ids.gather(1, episodes.lengths.unsqueeze(1) - 1).squeeze(1) == 1
    assert torch.equal(episodes.terminated, eos)


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"critic": "reference"}, {"collect": "steps"}], ids=str)
def test_ppo_learns_and_never_passes_the_optimum(config: dict[str, Any]) -> None:
    envs = tiny_envs(num_envs=64 if config.get("collect") == "steps" else 1, reward=count_b, max_new_tokens=3)
    agent = tiny_ppo(envs, batch_size=64, micro_batch_size=64, epochs=4, minibatches=2, lr=5e-3, **config)
    truth = Truth(envs)
    curve = []
    best = truth.optimum()

    def grade(step: int, metrics: dict[str, float]) -> bool:
        with torch.no_grad():
            curve.append(truth.objective(agent.policy.actor).item())
        return len(curve) < 25

    with torch.no_grad():
        reference = truth.objective(agent.policy.actor).item()
    agent.learn(10**6, grade)
    assert best > reference + 0.5
    assert max(curve) <= best + 1e-5
    share = (curve[-1] - reference) / (best - reference)
    assert share > 0.85, f"{share:.2f} of the gain from {reference:.2f} to {best:.2f}"


# -- acting ----------------------------------------------------------------------------------------------------------


def test_predict_chooses_from_the_policy_at_the_state_shown() -> None:
    envs = longer()
    agent = moved(tiny_ppo(envs, sampler=Sampler(greedy_tokens=2)), scale=0.3)
    prompt = envs.engine.prompts[1].ids
    response = (3, 4, 5)
    shown = []
    for n in range(4):
        ids = np.zeros(envs.engine.width + 6, np.int64)
        mask = np.zeros(envs.engine.width + 6, np.int8)
        ids[1:3] = prompt
        ids[3 : 3 + n] = response[:n]
        mask[1 : 3 + n] = 1
        shown.append({"input_ids": ids, "attention_mask": mask})
    together = {name: np.stack([s[name] for s in shown]) for name in shown[0]}
    with torch.no_grad():
        logits = [agent.policy.actor(torch.tensor([[*prompt, *response[:n]]])).logits[0, -1] for n in range(4)]
    best = [int(row.argmax()) for row in logits]
    actions, state = agent.predict(together, deterministic=True)
    assert actions.tolist() == best
    assert state is None
    assert [int(agent.predict(s, deterministic=True)[0]) for s in shown] == best
    draws = np.stack([agent.predict(together)[0] for _ in range(300)])
    assert (draws[:, :2] == best[:2]).all()  # greedy for two tokens, each row by its own count
    for n in (2, 3):
        distribution = logits[n].softmax(-1)
        counts = np.bincount(draws[:, n], minlength=7) / 300
        assert np.abs(counts - distribution.numpy()).max() < 4 * 0.5 / 300**0.5


# -- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("critic", ["shared", "reward_model"])
def test_ppo_trains_on_a_gpu(parts: dict[str, object], critic: Critic) -> None:
    envs = {device: RLHFVectorEnv(1, device=device, **parts) for device in ("cpu", "cuda")}
    agent = tiny_ppo(envs["cuda"], critic=critic)
    assert agent.policy.device.type == "cuda"
    on_gpu = learn(agent, 2)
    on_cpu = learn(tiny_ppo(envs["cpu"], critic=critic), 2)
    assert all(math.isfinite(x) for metrics in on_gpu for x in metrics.values())
    for name in ("rollout/score", "rollout/length", "train/entropy", "train/policy_loss", "train/value_loss"):
        assert on_gpu[0][name] == pytest.approx(on_cpu[0][name], abs=1e-3), name
