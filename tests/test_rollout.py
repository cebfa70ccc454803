"""Whole episodes: the same as stepping, as decoding alone, and as recomputing every number from the finished text."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import WORDS, gpt2, shifted, tiny_lm, word_count, word_tokenizer
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from transformers import MistralConfig

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import check_kl_is_plausible, discounted_return, episode_kl, token_rewards
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.padding import pack
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.rollout import collect, collect_steps
from lmgym.tasks import Task

ID = "lmgym/RLHF-v0"
EOS = 1
V = len(WORDS) + 3
P = 6
T = 8
N = 6
SAMPLERS = {
    "plain": Sampler(),
    "temperature": Sampler(temperature=0.7),
    "hot": Sampler(temperature=2.0),
    "top-p": Sampler(top_p=0.8),
    "top-k": Sampler(top_k=4),
    "greedy": Sampler(temperature=0),
    "greedy, then top-p": Sampler(temperature=1.3, top_p=0.9, greedy_tokens=2),
}
Parts = dict[str, Any]


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    """Another model than the reference, with a value head."""
    head = torch.nn.Linear(32, 1)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    model = gpt2(V + 3, seed=11, scale=0.25)
    with torch.no_grad():  # responses of all lengths: the EOS is likelier than most tokens
        model.transformer.ln_f.bias += model.lm_head.weight[EOS]
    return CausalPolicy(CausalLM(freeze(model), word_tokenizer()), head)


def native(parts: Parts, num_envs: int = N, **changes: Any) -> RLHFVectorEnv:
    envs = gym.make_vec(ID, num_envs=num_envs, **{**parts, "autoreset_mode": "SameStep", **changes})
    assert isinstance(envs, RLHFVectorEnv)
    return envs


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(shifted(seed))


def assert_same(one: Episodes, other: Episodes, *, leave_out: tuple[str, ...] = ("prompt_index",)) -> None:
    """Equal where a token was chosen; log-probs, values and scores to round-off."""
    assert torch.equal(one.response_mask, other.response_mask)
    mask = one.response_mask
    for f in fields(Episodes):
        left = getattr(one, f.name)
        right = getattr(other, f.name)
        if f.name in leave_out:
            continue
        assert (left is None) == (right is None), f.name
        if left is None:
            continue
        if f.name.startswith("response") or f.name in ("log_probs", "ref_log_probs", "values"):
            left = left[mask]
            right = right[mask]
        if left.is_floating_point():
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5, msg=lambda text, f=f: f"{f.name}: {text}")
        else:
            assert torch.equal(left, right), f.name


# --- step by step ----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_whole_episodes_are_those_of_stepping(parts: Parts, policy: CausalPolicy, sampler: Sampler) -> None:
    envs = native(parts)
    envs.reset(seed=0)
    fast = collect(envs, policy, 2 * N, sampler, rng())
    for round_ in range(2):
        rows = slice(round_ * N, (round_ + 1) * N)
        prompts = [envs.engine.prompts[int(i)] for i in fast.prompt_index[rows]]
        stepped = native(parts, prompts=[prompt.text for prompt in prompts], prompt_order="sequential")
        generator = rng()
        torch.rand((round_ * N, T), generator=generator, dtype=torch.float64)  # the rounds before
        slow = collect_steps(stepped, policy, N, sampler, generator)
        width = slow.prompt_ids.shape[1]
        part = fast[rows].trimmed()
        assert torch.equal(part.prompt_ids, slow.prompt_ids[:, width - part.prompt_ids.shape[1] :])
        assert_same(fast[rows], slow, leave_out=("prompt_index", "prompt_ids", "prompt_mask"))
    if sampler.temperature > 0 and sampler.top_k is None:  # the few likeliest tokens of the model need not be an EOS
        assert {int(n) for n in fast.lengths} != {T}
    assert fast.values is not None


@pytest.mark.parametrize("config", [{}, {"kl_coef": 0.0}, {"min_new_tokens": 4}], ids=str)
def test_responses_that_go_on_from_a_prefix_are_those_of_stepping(
    parts: Parts, policy: CausalPolicy, config: Parts
) -> None:
    envs = native(parts, **config)
    prompts = [envs.engine.prompts[i] for i in (0, 1, 0, 1, 0, 1)]
    prefix = torch.tensor([[4, 5, 3], [3, 3, 6], [4, 5, 3], [5, 4, 4], [3, 4, 5], [6, 6, 6]])
    sampler = Sampler(temperature=2.0)
    episodes = collect(envs, policy, prompts, sampler, rng(), prefix)
    assert torch.equal(episodes.response_ids[:, :3], prefix)
    for name in ("log_probs", "ref_log_probs", "values"):
        assert (getattr(episodes, name)[:, :3] == 0).all()
    uniforms = torch.rand((6, T), generator=rng(), dtype=torch.float64)
    rewards = token_rewards(episodes, 0.0) + envs.kl_coef * episodes.ref_log_probs
    env = gym.make(ID, **{**parts, **config})
    for i, prompt in enumerate(prompts):
        env.reset(options={"prompt_index": prompt.index, "response_ids": prefix[i].tolist()})
        state = policy.begin(*(x[i : i + 1] for x in (episodes.prompt_ids, episodes.prompt_mask)), T)
        for token in prefix[i]:
            state.step(token.unsqueeze(0))
        for t in range(3, T):
            tokens, log_probs = sampler.sample(state.logits, t, uniforms[i : i + 1, t])
            _, reward, terminated, _, _ = env.step(int(tokens))
            assert tokens == episodes.response_ids[i, t]
            assert reward == pytest.approx(rewards[i, t].item(), abs=1e-5)
            torch.testing.assert_close(log_probs, episodes.log_probs[i : i + 1, t], rtol=0, atol=1e-5)
            torch.testing.assert_close(state.values, episodes.values[i : i + 1, t], rtol=0, atol=1e-5)  # type: ignore[index]
            assert terminated == (t == episodes.lengths[i] - 1)
            if terminated:
                break
            state.step(tokens)
    assert len(set(episodes.lengths.tolist())) > 1


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([3], r"`response_ids` must have shape \(1, S\), got \(1,\)"),
        ([[3, EOS]], "`response_ids` must not end the episode, and token 1 is an EOS"),
        ([[3] * T], "`response_ids` must be shorter than 8 tokens, got 8"),
    ],
)
def test_a_prefix_must_leave_something_to_choose(
    parts: Parts, policy: CausalPolicy, prefix: list[Any], message: str
) -> None:
    envs = native(parts)
    with pytest.raises(InvalidArgumentError, match=message):
        collect(envs, policy, [envs.engine.prompts[0]], response_ids=torch.tensor(prefix))


@pytest.mark.parametrize(
    "config",
    [
        {"min_new_tokens": 3, "missing_eos_penalty": 1.5, "gamma": 0.9},
        {"truncate": True},
        {"kl_coef": 0.0},
        {"group_size": 2},
    ],
    ids=str,
)
def test_in_every_configuration(parts: Parts, policy: CausalPolicy, config: Parts) -> None:
    one = native(parts, **config)
    other = native(parts, **config)
    one.reset(seed=3)
    other.reset(seed=3)
    fast = collect(one, policy, N, None, rng(1))
    slow = collect_steps(other, policy, N, None, rng(1))
    assert_same(fast, slow)
    assert (fast.terminated == (slow.lengths < T) | ~torch.tensor("truncate" in config) | _ends(fast)).all()
    if config.get("kl_coef") == 0.0:
        assert (fast.ref_log_probs == 0).all()
    if "group_size" in config:
        assert (fast.prompt_index[0::2] == fast.prompt_index[1::2]).all()


def _ends(episodes: Episodes) -> torch.Tensor:
    last = episodes.response_ids.gather(1, (episodes.lengths - 1).unsqueeze(1)).squeeze(1)
    return last == EOS


def test_a_late_payment_is_the_same_sum(parts: Parts, policy: CausalPolicy) -> None:
    """Stepping with `dense_kl=False` hears of the reference only at the end."""
    one = native(parts, dense_kl=False)
    other = native(parts, dense_kl=False)
    dense = native(parts)
    for envs in (one, other, dense):
        envs.reset(seed=3)
    fast = collect(one, policy, N, None, rng(1))
    slow = collect_steps(other, policy, N, None, rng(1))
    plain = None
    assert_same(fast, slow, leave_out=("prompt_index", "ref_log_probs"))
    torch.testing.assert_close(token_rewards(fast, 0.2, dense=False), token_rewards(slow, 0.2, dense=False))
    plain = collect(dense, policy, N, None, rng(1))
    assert_same(fast, plain)


@pytest.mark.parametrize("name", ["plain", "top-p", "greedy"])
def test_gymnasiums_own_vector_env_gives_the_same(parts: Parts, policy: CausalPolicy, name: str) -> None:
    sync = SyncVectorEnv([lambda: gym.make(ID, **parts)] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    envs = native(parts, 3)
    # `collect_steps` resets without a seed: the generators of the rows go on from here.
    sync.reset(seed=5)
    envs.reset(seed=5)
    fast = collect(envs, policy, 3, SAMPLERS[name], rng(2))
    assert_same(fast, collect_steps(sync, policy, 3, SAMPLERS[name], rng(2)))


def test_stepping_needs_a_multiple_of_the_rows(parts: Parts, policy: CausalPolicy) -> None:
    with pytest.raises(InvalidArgumentError, match="`episodes` must be a multiple of the number of envs, 6, got 7."):
        collect_steps(native(parts), policy, 7)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_stepping_needs_same_step_autoreset(parts: Parts, policy: CausalPolicy, mode: str) -> None:
    sync = SyncVectorEnv([lambda: gym.make(ID, **parts)] * 3, autoreset_mode=mode)
    for envs in (native(parts, autoreset_mode=mode), sync):
        with pytest.raises(InvalidArgumentError, match=f"`autoreset_mode` must be 'SameStep' .* got '{mode}'"):
            collect_steps(envs, policy, envs.num_envs)


def test_the_gold_score_comes_along(parts: Parts, policy: CausalPolicy) -> None:
    task = Task(
        name="tiny", model=parts["model"], reward=parts["reward"], gold=word_count, prompts={"train": ["a film", "it"]},
        kl_coef=0.2, max_new_tokens=T,
    )  # fmt: skip
    one, other = (gym.make_vec(ID, num_envs=4, task=task, autoreset_mode="SameStep") for _ in range(2))
    for envs in (one, other):
        envs.reset(seed=0)
    fast = collect(one, policy, 4, None, rng())
    slow = collect_steps(other, policy, 4, None, rng())
    assert_same(fast, slow)
    assert fast.gold_scores is not None
    words = ((fast.input_ids > 2) & fast.attention_mask).sum(1)  # all but the special tokens
    torch.testing.assert_close(fast.gold_scores, 0.1 * words)


# --- alone ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "hot", "top-p", "greedy, then top-p"])
def test_rows_that_finish_and_leave_do_not_change_the_others(parts: Parts, policy: CausalPolicy, name: str) -> None:
    envs = native(parts)
    sampler = SAMPLERS[name]
    prompts = [envs.engine.prompts[i % 6] for i in range(40)]
    together = collect(envs, policy, prompts, sampler, rng(4))
    assert len(set(together.lengths.tolist())) > 3  # many leave, at many times
    generator = rng(4)
    alone = Episodes.concatenate([collect(envs, policy, [prompt], sampler, generator) for prompt in prompts])
    assert_same(together, alone, leave_out=())
    order = [39, 3, 17, 4]
    assert torch.equal(together.prompt_index[order], torch.tensor([prompts[i].index for i in order]))


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, None, 2)])
def test_some_rows_are_those_of_the_whole_batch(parts: Parts, policy: CausalPolicy, rows: slice) -> None:
    generators = [rng(6), rng(6)]
    envs = [native(parts), native(parts)]
    for each in envs:
        each.reset(seed=2)
    whole = collect(envs[0], policy, N, None, generators[0])
    some = collect(envs[1], policy, N, None, generators[1], rows=rows)
    assert_same(some, whole[rows], leave_out=())
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    following = [[prompt.index for prompt in each.next_prompts(2)] for each in envs]
    assert following[0] == following[1]


def test_the_rows_of_the_env_are_not_touched(parts: Parts, policy: CausalPolicy) -> None:
    one = native(parts)
    other = native(parts)
    for envs in (one, other):
        envs.reset(seed=0)
        envs.step(np.full(N, 5))
    collect(one, policy, [one.engine.prompts[0]] * 3, None, rng())
    for token in (6, 7, EOS):
        assert data_equivalence(one.step(np.full(N, token)), other.step(np.full(N, token)))


def test_one_generator_one_batch_and_no_global_one(parts: Parts, policy: CausalPolicy) -> None:
    envs = native(parts)
    prompts = [envs.engine.prompts[0]] * 12
    state = torch.get_rng_state()
    first, again, other = (collect(envs, policy, prompts, None, rng(seed)) for seed in (0, 0, 1))
    assert_same(first, again, leave_out=())
    assert torch.equal(first.log_probs, again.log_probs)
    assert not torch.equal(first.response_ids, other.response_ids)
    fresh = collect(envs, policy, prompts)
    fresher = collect(envs, policy, prompts)
    assert not torch.equal(fresh.response_ids, fresher.response_ids)  # without one, every call draws anew
    collect_steps(envs, policy, N)
    assert torch.equal(torch.get_rng_state(), state)


# --- recomputed ----------------------------------------------------------------------


def recomputed(policy: CausalPolicy, episodes: Episodes, sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) log-probs and values of the chosen tokens from one plain forward over the finished texts."""
    mask = episodes.response_mask
    ids, rows, columns, targets = pack(episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, mask)
    positions = mask.nonzero()[:, 1]
    with torch.inference_mode():
        hidden, logits = policy.lm.response_hidden(ids, rows, columns)
        log_probs = sampler.log_distribution(logits, positions).gather(1, targets.unsqueeze(1)).squeeze(1)
        assert policy.value_head is not None
        return log_probs, policy.value_head(hidden).squeeze(1)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_log_probs_and_values_are_those_of_the_distribution_that_sampled(
    parts: Parts, policy: CausalPolicy, sampler: Sampler
) -> None:
    envs = native(parts)
    episodes = collect(envs, policy, 30, sampler, rng(5))
    mask = episodes.response_mask
    log_probs, values = recomputed(policy, episodes, sampler)
    torch.testing.assert_close(episodes.log_probs[mask], log_probs, rtol=0, atol=1e-5)
    assert episodes.values is not None
    torch.testing.assert_close(episodes.values[mask], values, rtol=0, atol=1e-5)
    assert values.std() > 0.1
    assert (episodes.log_probs[~mask] == 0).all()
    assert (episodes.values[~mask] == 0).all()
    assert (episodes.response_ids[~mask] == 0).all()
    if sampler != Sampler():  # the distribution without the sampler's cut would be another
        assert (recomputed(policy, episodes, Sampler())[0] - log_probs).abs().max() > 0.1


def test_rewards_and_returns_are_those_of_the_env(parts: Parts, policy: CausalPolicy) -> None:
    """The reward of the design is the env's own minus the policy's half."""
    envs = native(parts, gamma=0.9)
    episodes = collect(envs, policy, 20, None, rng(6))
    prompts = [envs.engine.prompts[int(i)] for i in episodes.prompt_index]
    replay = envs.replay(prompts, episodes.response_ids.numpy())
    own = torch.from_numpy(replay.rewards).float()
    rewards = token_rewards(episodes, envs.kl_coef)
    torch.testing.assert_close(rewards, own - 0.2 * episodes.log_probs, rtol=0, atol=1e-5)
    returns = discounted_return(own, 0.9)
    torch.testing.assert_close(returns.tolist(), replay.outcomes.discounted_returns, rtol=0, atol=1e-5)


def test_the_reference_as_a_policy_has_no_kl(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read again: what it sampled with are its log-probs. Under another sampler they are not."""
    envs = native(parts)
    reference = CausalPolicy(envs.engine.lm)
    reads: list[int] = []
    read = CausalLM.response_log_probs
    monkeypatch.setattr(CausalLM, "response_log_probs", lambda *args: reads.append(1) or read(*args))
    prompts = envs.next_prompts(60)
    episodes = collect(envs, reference, prompts, None, rng(7))
    assert not reads
    assert episodes.values is None
    known = envs.replay(prompts, episodes.response_ids.numpy())
    torch.testing.assert_close(episodes.log_probs, torch.from_numpy(known.ref_log_probs).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(episodes.ref_log_probs, episodes.log_probs, rtol=0, atol=0)
    check_kl_is_plausible(episode_kl(episodes))
    sharp = collect(envs, reference, 60, Sampler(temperature=0.5), rng(7))
    assert len(reads) == 2
    assert episode_kl(sharp).mean() > 0.5  # another distribution, and its log-probs say so


def test_a_policy_that_the_ring_cannot_drive(parts: Parts) -> None:
    """The slow decoder with the same interface: tokens, values, and rows that leave."""
    lm = tiny_lm(
        MistralConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, sliding_window=4, initializer_range=0.3, max_position_embeddings=40,
        )
    )  # fmt: skip
    head = torch.nn.Linear(32, 1)
    policy = CausalPolicy(lm, head)
    envs = native(parts)
    with pytest.warns(UserWarning, match="falling back to a full forward"):
        episodes = collect(envs, policy, 20, None, rng(8))
    log_probs, values = recomputed(policy, episodes, Sampler())
    mask = episodes.response_mask
    torch.testing.assert_close(episodes.log_probs[mask], log_probs, rtol=0, atol=1e-5)
    assert episodes.values is not None
    torch.testing.assert_close(episodes.values[mask], values, rtol=0, atol=1e-5)
