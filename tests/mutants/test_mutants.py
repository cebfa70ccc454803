"""Known bugs of RLHF code, swapped in one at a time: each must turn a named invariant red, or a test is missing.

A mutant is a line of the library rewritten in place, and so of every module that imported the function. A line that has
changed since makes its mutant fail with a word: rewrite the mutant then.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import gpt2, word_tokenizer
from torch import Tensor, nn

import agents.advantages
import agents.batch
import agents.losses
import agents.on_policy
import agents.policies.actor_critic
import lmgym.models.causal
from agents.algorithms.ppo import PPO, PPOConfig
from agents.batch import Batch
from agents.diagnostics import exact_kl
from lmgym import kl, rollout
from lmgym.ending import EndRule
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.sampling import Sampler, inverse_cdf
from lmgym.tasks.base import Task

KL_COEF = 0.3
HORIZON = 5
EOS = 1


def tiny_lm(dropout: float = 0.0) -> CausalLM:
    """A random model of one layer and 7 words."""
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    model = gpt2(len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=16)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return CausalLM(freeze(model), tokenizer)


LM = tiny_lm()  # shared by all that do not change it


def tiny_envs(num_envs: int = 1, *, lm: CausalLM = LM, **task: Any) -> RLHFVectorEnv:
    """The token MDP over a tiny model; the score counts words."""
    made = Task(
        name="tiny",
        model=lm,
        reward=lambda prompts, completions, **_: [1 + 0.5 * c.count("b") - 0.2 * c.count("c") for c in completions],
        prompts={"train": ["a", "b c", "d d a"]},
        kl_coef=KL_COEF,
        max_new_tokens=HORIZON,
        **task,
    )
    return RLHFVectorEnv(num_envs, autoreset_mode="Disabled", task=made, device="cpu", prompt_order="sequential")


def ppo_at_work(envs: RLHFVectorEnv | None = None, *, sampler: Sampler | None = None, **config: Any) -> PPO:
    """An agent in the midst of training: none of its parameters is zero or the reference's."""
    config = {"batch_size": 48, "micro_batch_size": 48, "epochs": 1, "minibatches": 1, "max_grad_norm": 0.0} | config
    agent = PPO(envs or tiny_envs(), PPOConfig(**config), sampler=sampler)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn(parameter.shape, generator=generator))
    agent.num_timesteps = 1
    return agent


def sampled(agent: PPO) -> Episodes:
    """A batch, without the checks that a run makes on it."""
    return agents.on_policy.collect(agent.envs, agent.policy, agent.config.batch_size, agent.sampler, agent.generator)


def responses_of(episodes: Episodes) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of each episode as token ids, the response up to and including its first EOS, by eye."""
    rows = []
    for prompt, mask, response in zip(
        episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids.tolist(), strict=True
    ):
        end = response.index(EOS) + 1 if EOS in response else HORIZON
        rows.append((prompt[mask].tolist(), response[:end]))
    return rows


def plain_log_probs(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """(n,) nats of a response, from one forward of the Hugging Face model over it alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(response)), response]


def assert_near(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert np.shape(got) == np.shape(expected)
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() < tolerance


# -- the invariants --------------------------------------------------------------------------------------------------


def rewards_are_rebuilt_by_hand() -> None:
    agent = ppo_at_work()
    episodes = sampled(agent)
    rewards = agents.on_policy.token_rewards(episodes, KL_COEF)
    for i, (prompt, response) in enumerate(responses_of(episodes)):
        ref = plain_log_probs(agent.envs.engine.lm.model, prompt, response)
        own = plain_log_probs(agent.policy.actor, prompt, response)
        expected = torch.zeros(HORIZON)
        expected[: len(response)] = KL_COEF * (ref - own)
        expected[len(response) - 1] += 1 + 0.5 * response.count(4) - 0.2 * response.count(5)
        assert_near(rewards[i], expected)


def the_kl_is_rebuilt_by_hand() -> None:
    agent = ppo_at_work()
    episodes = sampled(agent)
    expected = [
        (plain_log_probs(agent.policy.actor, *row) - plain_log_probs(agent.envs.engine.lm.model, *row)).sum().item()
        for row in responses_of(episodes)
    ]
    assert_near(agents.on_policy.episode_kl(episodes), expected)


def an_episode_ends_with_its_first_eos() -> None:
    episodes = sampled(ppo_at_work())
    lengths = [len(response) for _, response in responses_of(episodes)]
    assert len(set(lengths)) > 2
    assert episodes.lengths.tolist() == lengths
    assert episodes.response_mask.tolist() == [[t < n for t in range(HORIZON)] for n in lengths]


def stepping_and_replaying_agree() -> None:
    envs = tiny_envs(24)
    tokens = np.random.default_rng(0).integers(1, 7, (24, HORIZON))
    envs.reset(seed=0)
    prompts = [envs.engine.prompts[i % 3] for i in range(24)]
    replay = envs.replay(prompts, tokens)
    envs.reset(options={"prompt_index": 0})
    envs.engine.begin(np.arange(24), prompts)
    rewards = np.zeros((24, HORIZON))
    mask = np.zeros((24, HORIZON), dtype=bool)
    for t in range(HORIZON):
        live = envs.engine.running.copy()
        mask[:, t] = live
        rewards[:, t] = envs.engine.step(tokens[:, t], live).rewards
    assert not envs.engine.running.any()
    assert (replay.response_mask == mask).all()
    assert_near(replay.rewards, rewards)


def log_probs_are_of_the_distribution_that_sampled() -> None:
    for temperature in (1.0, 0.5):
        agent = ppo_at_work(tiny_envs(lm=tiny_lm(dropout=0.5)), sampler=Sampler(temperature=temperature))
        episodes = sampled(agent)
        for i, (prompt, response) in enumerate(responses_of(episodes)):
            expected = plain_log_probs(agent.policy.actor, prompt, response, temperature)
            assert_near(episodes.log_probs[i, : len(response)], expected)


def the_update_reads_the_log_probs_that_were_sampled() -> None:
    for temperature in (1.0, 0.5):
        agent = ppo_at_work(sampler=Sampler(temperature=temperature))
        episodes = sampled(agent)
        zeros = torch.zeros_like(episodes.log_probs)
        batch = agent.read(Batch(episodes, zeros, zeros), episodes.lengths.sum(), len(episodes))
        assert_near(batch.log_probs.detach(), batch.old_log_probs)
        assert_near(batch.values.detach(), batch.old_values)


def a_truncated_episode_has_a_future() -> None:
    agent = ppo_at_work(tiny_envs(truncate=True, gamma=0.9), gae_lambda=1.0, whiten_advantages="none")
    nn.init.constant_(agent.policy.value_head.bias, 5.0)
    episodes = sampled(agent)
    rewards = kl.token_rewards(episodes, KL_COEF)
    _, returns = agent.advantages(episodes, rewards)
    after = agent.policy.next_values(episodes)
    assert 0 < episodes.terminated.sum() < len(episodes)
    for i, (_, response) in enumerate(responses_of(episodes)):
        n = len(response)
        future = 0.0 if response[-1] == EOS else 0.9**n * after[i].item()
        expected = sum(0.9**t * rewards[i, t].item() for t in range(n)) + future
        assert_near(returns[i, 0], expected)


def advantages_are_sums_of_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn((2, 6, HORIZON), generator=generator)
    mask = torch.arange(HORIZON) < torch.tensor([5, 1, 3, 2, 4, 5]).unsqueeze(1)
    advantages, _ = agents.advantages.gae(rewards, values, mask, 0.9, 0.8)
    for i, n in enumerate(mask.sum(-1).tolist()):
        v = [*values[i, :n].tolist(), 0.0]
        deltas = [rewards[i, t].item() + 0.9 * v[t + 1] - v[t] for t in range(n)]
        expected = [sum(0.72 ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)] + [0.0] * (HORIZON - n)
        assert_near(advantages[i], expected)


def whitened_advantages_have_mean_zero_over_the_mask() -> None:
    x = 3 * torch.randn((6, HORIZON), generator=torch.Generator().manual_seed(0)) + 5
    mask = torch.arange(HORIZON) < torch.tensor([5, 1, 3, 2, 4, 5]).unsqueeze(1)
    kept = agents.advantages.whiten(x, mask)[mask]
    assert_near(kept.mean(), 0.0)
    assert_near(kept.square().mean(), 1.0)


def gradient_of(agent: PPO, episodes: Episodes) -> Tensor:
    agent.learn_from(agent.shape(episodes))
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None])


def padding_does_not_change_the_update() -> None:
    episodes = sampled(ppo_at_work())
    assert episodes.values is not None
    wide = {
        name: nn.functional.pad(getattr(episodes, name), (0, 4))
        for name in ("response_ids", "response_mask", "log_probs", "ref_log_probs", "values")
    }
    gradients = [gradient_of(ppo_at_work(), e) for e in (episodes, replace(episodes, **wide))]
    assert gradients[0].norm() > 0.01
    assert_near(*gradients, tolerance=1e-6)


def accumulation_does_not_change_the_update() -> None:
    episodes = sampled(ppo_at_work())
    assert_near(
        gradient_of(ppo_at_work(), episodes), gradient_of(ppo_at_work(micro_batch_size=5), episodes), tolerance=1e-6
    )


def the_reference_stays_what_it_was() -> None:
    envs = tiny_envs(lm=tiny_lm())
    agent = PPO(envs, PPOConfig(batch_size=16, lr=1e-2))
    model = envs.engine.lm.model
    before = [p.clone() for p in model.parameters()]
    agent.learn_from(agent.shape(sampled(agent)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert exact_kl(agent.policy, agent.sampler, envs.engine.lm, sampled(agent)) > 1e-4


def two_reads_of_one_policy_agree() -> None:
    agent = ppo_at_work(tiny_envs(lm=tiny_lm(dropout=0.5)))
    episodes = sampled(ppo_at_work())
    first = agent.policy.read(episodes)
    second = agent.policy.read(episodes)
    assert_near(first.logits.detach(), second.logits.detach(), tolerance=1e-6)


def a_better_action_becomes_likelier_and_no_further_than_the_clip() -> None:
    old = torch.tensor([-1.0])
    one = torch.ones(1)
    for log_ratio, advantage, slope in ((0.0, 1.0, -1.0), (0.0, -1.0, 1.0), (0.5, 1.0, 0.0), (-0.5, -1.0, 0.0)):
        log_prob = (old + log_ratio).requires_grad_()
        agents.losses.clipped_policy_loss(log_prob, old, advantage * one, one, 0.2).loss.backward()
        assert log_prob.grad is not None
        assert_near(log_prob.grad, [slope])


# -- the mutants -----------------------------------------------------------------------------------------------------


def rewrite(function: Any, old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Replaces a piece of a function's source, in place."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = inspect.unwrap(function)
        source = textwrap.dedent(inspect.getsource(plain))
        assert source.count(old) == 1, f"`{plain.__qualname__}` no longer has {old!r} once: rewrite this mutant."
        body = source[source.index("def ") :].replace(old, new)
        scope: dict[str, Any] = {}
        code = compile(body, "<mutant>", "exec", flags=annotations.compiler_flag)
        exec(code, plain.__globals__, scope)
        monkeypatch.setattr(plain, "__code__", scope[plain.__name__].__code__)

    return patch


def temperature_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(self: Sampler, logits: Tensor, t: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _ = inverse_cdf(self.adjust_logits(logits, t), uniforms)
        return tokens, logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)

    monkeypatch.setattr(Sampler, "sample", sample)


def policy_moved_after_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(envs: Any, policy: Any, *rest: Any, **named: Any) -> Episodes:
        episodes = rollout.collect(envs, policy, *rest, **named)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(0.9)
        return episodes

    monkeypatch.setattr(agents.on_policy, "collect", collect)


class Mutant(NamedTuple):
    name: str
    patch: Callable[[pytest.MonkeyPatch], None]
    check: Callable[[], None]


MUTANTS = [
    Mutant(
        "mask inverted",
        rewrite(kl.token_rewards, "* episodes.response_mask", "* ~episodes.response_mask"),
        rewards_are_rebuilt_by_hand,
    ),
    Mutant(
        "KL sign in the reward",
        rewrite(kl.token_rewards, "ref_log_probs - episodes.log_probs", "log_probs - episodes.ref_log_probs"),
        rewards_are_rebuilt_by_hand,
    ),
    Mutant(
        "KL sign in the metric",
        rewrite(kl.episode_kl, "log_probs - episodes.ref_log_probs", "ref_log_probs - episodes.log_probs"),
        the_kl_is_rebuilt_by_hand,
    ),
    Mutant(
        "reward on the pad token after the last",
        rewrite(kl.token_rewards, "(episodes.lengths - 1)", f"episodes.lengths.clamp(max={HORIZON - 1})"),
        rewards_are_rebuilt_by_hand,
    ),
    Mutant(
        "reward on the last column",
        rewrite(kl.token_rewards, "(episodes.lengths - 1)", f"torch.full_like(episodes.lengths, {HORIZON - 1})"),
        rewards_are_rebuilt_by_hand,
    ),
    Mutant(
        "EOS left out of the response",
        rewrite(EndRule.find_ends, "by_eos.argmax(1) + 1", "by_eos.argmax(1)"),
        an_episode_ends_with_its_first_eos,
    ),
    Mutant(
        "one token after the EOS taken in",
        rewrite(EndRule.find_ends, "by_eos.argmax(1) + 1", "np.minimum(by_eos.argmax(1) + 2, self.horizon)"),
        stepping_and_replaying_agree,
    ),
    Mutant(
        "horizon one short",
        rewrite(EndRule.is_end, "self.horizon - 1", "self.horizon - 2"),
        stepping_and_replaying_agree,
    ),
    Mutant(
        "temperature forgotten in the log-prob", temperature_forgotten, log_probs_are_of_the_distribution_that_sampled
    ),
    Mutant(
        "temperature forgotten in the update",
        rewrite(Sampler.adjust_rows, "adjusted = self.adjust_logits(logits, self.greedy_tokens)", "adjusted = logits"),
        the_update_reads_the_log_probs_that_were_sampled,
    ),
    Mutant("stale log-probs", policy_moved_after_sampling, the_update_reads_the_log_probs_that_were_sampled),
    Mutant(
        "logits of the token itself",
        rewrite(lmgym.models.padding.pack, "+ t - 1", "+ t.clamp(max=ids.shape[1] - 2 - prompt_mask.sum(-1)[rows])"),
        the_update_reads_the_log_probs_that_were_sampled,
    ),
    Mutant(
        "truncation handled as termination",
        rewrite(agents.on_policy.OnPolicyAgent.gae, "not bool(episodes.terminated.all())", "False"),
        a_truncated_episode_has_a_future,
    ),
    Mutant(
        "termination handled as truncation",
        rewrite(agents.on_policy.OnPolicyAgent.gae, "torch.where(episodes.terminated, 0.0, self", "(self"),
        a_truncated_episode_has_a_future,
    ),
    Mutant(
        "value of the padding leaks into the last delta",
        rewrite(agents.advantages.gae, "after = torch.where(alive, values[:, t], after)", "after = values[:, t]"),
        advantages_are_sums_of_deltas,
    ),
    Mutant(
        "discount left out of lambda's sum",
        rewrite(agents.advantages.gae, "gamma * gae_lambda * last", "gae_lambda * last"),
        advantages_are_sums_of_deltas,
    ),
    Mutant(
        "whitening adds the mean back",
        rewrite(agents.advantages.whiten, "if not shift_mean", "if shift_mean"),
        whitened_advantages_have_mean_zero_over_the_mask,
    ),
    Mutant(
        "pad counted in the mean of whitening",
        rewrite(agents.advantages.whiten, "chosen = x[mask]", "chosen = torch.where(mask, x, 0.0)"),
        whitened_advantages_have_mean_zero_over_the_mask,
    ),
    Mutant(
        "pad counted in the mean of the loss",
        rewrite(
            agents.on_policy.OnPolicyAgent.losses,
            "minibatch.episodes.lengths.sum()",
            "torch.tensor(minibatch.episodes.response_mask.numel())",
        ),
        padding_does_not_change_the_update,
    ),
    Mutant(
        "mean of the means of micro-batches",
        rewrite(agents.batch.read_minibatch, "/ total", "/ len(read.values)"),
        accumulation_does_not_change_the_update,
    ),
    Mutant(
        "dropout left on in the update",
        rewrite(agents.policies.actor_critic._trainable, "copied.eval()", "copied.train()"),
        two_reads_of_one_policy_agree,
    ),
    Mutant(
        "dropout left on while sampling",
        rewrite(agents.policies.actor_critic._trainable, "copied.eval()", "copied.train()"),
        log_probs_are_of_the_distribution_that_sampled,
    ),
    Mutant(
        "reference not frozen",
        rewrite(agents.policies.actor_critic._trainable, "copy.deepcopy(model)", "model"),
        the_reference_stays_what_it_was,
    ),
    Mutant(
        "policy gradient upside down",
        rewrite(agents.losses.clipped_policy_loss, "loss = -(weights", "loss = (weights"),
        a_better_action_becomes_likelier_and_no_further_than_the_clip,
    ),
    Mutant(
        "the better of the two surrogates",
        rewrite(agents.losses.clipped_policy_loss, "torch.minimum", "torch.maximum"),
        a_better_action_becomes_likelier_and_no_further_than_the_clip,
    ),
]


@pytest.mark.filterwarnings("ignore:.*cannot be decoded with the ring cache")  # with dropout nothing is exact
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_known_bug_turns_its_invariant_red(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.check()
    with monkeypatch.context() as patched:
        mutant.patch(patched)
        with pytest.raises(AssertionError):
            mutant.check()


def test_what_a_mutant_rewrites_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for mutant in MUTANTS:
        with monkeypatch.context() as patched:
            mutant.patch(patched)
