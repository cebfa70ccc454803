"""The actor-critic: what it starts as, what it reads, and what it writes to disk, against plain Hugging Face calls."""

from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import gpt2, word_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2ForSequenceClassification

from agents.policies.actor_critic import ActorCritic, Critic, read_logits
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.kl import episode_kl
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.models.sharing import load_causal_lm
from lmgym.rollout import collect

CRITICS = get_args(Critic)


@pytest.fixture
def envs(parts: dict[str, object]) -> RLHFVectorEnv:
    envs = RLHFVectorEnv(num_envs=1, **parts)
    envs.reset(seed=0)
    return envs


def reward_model(envs: RLHFVectorEnv) -> nn.Module:
    return envs.engine.reward.model  # type: ignore[attr-defined, no-any-return]


def policy_of(envs: RLHFVectorEnv, critic: Critic = "shared", *, moved: bool = False) -> ActorCritic:
    """A fresh actor-critic; `moved` shifts every parameter, so that nothing is zero or equal to the reference."""
    policy = ActorCritic(envs.engine.lm, critic, reward_model(envs))
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def sampled(envs: RLHFVectorEnv, policy: ActorCritic, episodes: int = 24) -> Episodes:
    return collect(envs, policy, episodes, generator=torch.Generator().manual_seed(1))


def one_by_one(episodes: Episodes) -> list[tuple[int, int, Tensor, Tensor]]:
    """(row, prompt length, ids of prompt and response without padding (1, L), response) of every episode."""
    rows = []
    for i in range(len(episodes)):
        prompt = episodes.prompt_ids[i][episodes.prompt_mask[i]]
        response = episodes.response_ids[i][episodes.response_mask[i]]
        rows.append((i, len(prompt), torch.cat([prompt, response])[None], response))
    return rows


# -- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_the_policy_starts_as_the_reference_with_value_zero(envs: RLHFVectorEnv, critic: Critic) -> None:
    policy = policy_of(envs, critic)
    episodes = sampled(envs, policy)
    torch.testing.assert_close(policy.read(episodes).logits, read_logits(envs.engine.lm, episodes))
    assert torch.equal(policy.values(episodes), torch.zeros_like(episodes.log_probs))
    assert torch.equal(policy.next_values(episodes), torch.zeros(len(episodes)))
    reference = collect(
        envs, CausalPolicy(envs.engine.lm), [envs.engine.prompts[i] for i in episodes.prompt_index.tolist()],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert torch.equal(reference.response_ids, episodes.response_ids)
    torch.testing.assert_close(reference.log_probs, episodes.log_probs, rtol=0, atol=1e-5)
    # Decoding with a cache and scoring in one pass round differently, and by no more than that.
    assert episode_kl(episodes).abs().max() < 1e-4


def test_the_reference_stays_frozen_and_apart(envs: RLHFVectorEnv) -> None:
    reference = envs.engine.lm.model
    reward = reward_model(envs)
    kept = [p.clone() for model in (reference, reward) for p in model.parameters()]
    for critic in CRITICS:
        policy = policy_of(envs, critic, moved=True)
        assert all(p.requires_grad for p in policy.parameters())
        shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}
        assert not shared
    assert not any(p.requires_grad for model in (reference, reward) for p in model.parameters())
    now = [p for model in (reference, reward) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_dropout_is_off_while_gradients_are_on() -> None:
    model = gpt2(len(word_tokenizer()))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()  # as a careless caller leaves it
    policy = ActorCritic(CausalLM(model, word_tokenizer()))
    assert not any(module.training for module in policy.actor.modules())
    assert all(p.requires_grad for p in policy.parameters())


def test_a_critic_from_a_reward_that_is_no_model_is_refused(envs: RLHFVectorEnv) -> None:
    with pytest.raises(InvalidArgumentError, match="`critic` must be 'shared' or 'reference'"):
        ActorCritic(envs.engine.lm, "reward_model", None)


def test_a_critic_from_a_wider_reward_model_gets_a_head_of_its_width(envs: RLHFVectorEnv) -> None:
    wide = gpt2(len(word_tokenizer()), cls=GPT2ForSequenceClassification, num_labels=1, n_embd=64)
    policy = ActorCritic(envs.engine.lm, "reward_model", freeze(wide))
    assert policy.value_head.weight.shape == (1, 64)
    assert torch.equal(policy.values(sampled(envs, policy)), torch.zeros(24, envs.engine.horizon))


@pytest.mark.parametrize("critic", CRITICS)
def test_no_global_generator_is_touched(envs: RLHFVectorEnv, critic: Critic, tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    policy = policy_of(envs, critic)
    episodes = sampled(envs, policy)
    policy.read(episodes)
    policy.next_values(episodes)
    policy.save(tmp_path)
    policy.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


# -- reading ---------------------------------------------------------------------------------------------------------


def test_read_gives_the_logits_of_a_plain_forward_of_each_episode_alone(envs: RLHFVectorEnv) -> None:
    policy = policy_of(envs, moved=True)
    episodes = sampled(envs, policy)
    read = policy.read(episodes)
    log_pi = read.logits.detach().log_softmax(-1)
    chosen = episodes.response_ids[episodes.response_mask]
    log_probs = torch.zeros(episodes.log_probs.shape)
    log_probs[episodes.response_mask] = log_pi.gather(1, chosen.unsqueeze(1)).squeeze(1)
    assert len({len(r) for *_, r in one_by_one(episodes)}) > 1  # ragged, or this would test little
    with torch.no_grad():
        for i, p, ids, response in one_by_one(episodes):
            # Embeddings that the tokenizer has no word for are no part of the distribution.
            plain = policy.actor(input_ids=ids).logits[0, p - 1 : -1, : len(word_tokenizer())]
            chosen = plain.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(log_probs[i, : len(response)], chosen, rtol=0, atol=1e-5)
            torch.testing.assert_close(episodes.log_probs[i, : len(response)], chosen, rtol=0, atol=1e-5)


def test_read_can_be_differentiated_to_every_parameter(envs: RLHFVectorEnv) -> None:
    for critic in CRITICS:
        policy = policy_of(envs, critic, moved=True)
        read = policy.read(sampled(envs, policy))
        (read.logits.log_softmax(-1)[:, 2].sum() + read.values.sum()).backward()
        unused = {name for name, p in policy.named_parameters() if p.grad is None}
        assert not {name for name in unused if not name.startswith("actor.transformer.wpe")}, unused


def value_by_hand(policy: ActorCritic, ids: Tensor, column: int) -> Tensor:
    """The head on the trunk's last hidden state at a column of one sequence (1, L), from Hugging Face's output."""
    trunk = policy.actor.base_model if policy.critic is None else policy.critic
    hidden = trunk(input_ids=ids, output_hidden_states=True).hidden_states[-1]  # GPT-2 puts ln_f into the last one
    return (hidden[0, column] * policy.value_head.weight[0]).sum() + policy.value_head.bias[0]


@pytest.mark.parametrize("critic", CRITICS)
def test_values_are_those_of_the_state_before_each_token_and_behind_the_last(
    envs: RLHFVectorEnv, critic: Critic
) -> None:
    policy = policy_of(envs, critic, moved=True)
    episodes = sampled(envs, policy)
    values = policy.values(episodes)
    after = policy.next_values(episodes)
    assert (values[~episodes.response_mask] == 0).all()
    with torch.no_grad():
        for i, p, ids, response in one_by_one(episodes):
            expected = [value_by_hand(policy, ids[:, : p + t], p + t - 1) for t in range(len(response))]
            torch.testing.assert_close(values[i, : len(response)], torch.stack(expected), rtol=0, atol=1e-5)
            torch.testing.assert_close(after[i], value_by_hand(policy, ids, ids.shape[1] - 1), rtol=0, atol=1e-5)
    assert values[episodes.response_mask].std() > 1e-3


def test_critics_with_a_trunk_of_their_own_start_from_the_right_weights(envs: RLHFVectorEnv) -> None:
    sources = {"reference": envs.engine.lm.model.transformer, "reward_model": reward_model(envs).transformer}
    for critic, source in sources.items():
        policy = policy_of(envs, critic)  # type: ignore[arg-type]
        assert policy.critic is not None
        own = dict(policy.critic.named_parameters())
        assert own.keys() == dict(source.named_parameters()).keys()  # type: ignore[union-attr]
        assert all(torch.equal(own[name], p) for name, p in source.named_parameters())  # type: ignore[union-attr]
        actor = {p.data_ptr() for p in policy.actor.parameters()}
        assert not actor & {p.data_ptr() for p in policy.critic.parameters()}


def test_a_shared_critic_gives_the_same_values_while_decoding(envs: RLHFVectorEnv) -> None:
    policy = policy_of(envs, moved=True)
    episodes = sampled(envs, policy)
    assert episodes.values is not None
    torch.testing.assert_close(episodes.values, policy.values(episodes), rtol=0, atol=1e-5)
    assert sampled(envs, policy_of(envs, "reference")).values is None


def test_a_row_does_not_feel_its_batch_mates_or_its_padding(envs: RLHFVectorEnv) -> None:
    policy = policy_of(envs, "reference", moved=True)
    episodes = sampled(envs, policy)
    together = policy.read(episodes)
    rows = episodes.response_mask.nonzero()[:, 0]
    for i in range(len(episodes)):
        alone = policy.read(episodes[[i]].trimmed())
        torch.testing.assert_close(alone.logits, together.logits[rows == i], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.values, together.values[rows == i], rtol=0, atol=1e-5)


# -- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_what_is_saved_loads_as_a_hugging_face_model_and_back(
    envs: RLHFVectorEnv, critic: Critic, tmp_path: Path
) -> None:
    policy = policy_of(envs, critic, moved=True)
    episodes = sampled(envs, policy)
    policy.save(tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == policy.lm.tokenizer.get_vocab()
    mine = policy.actor.state_dict()
    theirs = plain.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids = one_by_one(episodes)[0][2]
    with torch.no_grad():  # not bit by bit: how weights lie in memory shows in the last bit of a product
        torch.testing.assert_close(plain(input_ids=ids).logits, policy.actor(input_ids=ids).logits, rtol=0, atol=1e-5)

    other = policy_of(envs, critic)
    assert not torch.equal(other.read(episodes).logits, policy.read(episodes).logits)
    other.load(tmp_path)
    for now, before in zip(other.read(episodes), policy.read(episodes), strict=True):
        assert torch.equal(now, before)
    own = other.state_dict()
    saved = policy.state_dict()
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], saved[name]) for name in saved)
    assert all(p.requires_grad for p in other.parameters())


def test_loading_reads_the_disk_anew_even_where_somebody_holds_an_older_copy(
    envs: RLHFVectorEnv, tmp_path: Path
) -> None:
    policy_of(envs).save(tmp_path)
    held = load_causal_lm(str(tmp_path), "cpu")  # an env whose reference is this very checkpoint, say
    moved = policy_of(envs, moved=True)
    moved.save(tmp_path)
    other = policy_of(envs)
    other.load(tmp_path)
    assert torch.equal(other.value_head.weight, moved.value_head.weight)
    assert torch.equal(other.actor.lm_head.weight, moved.actor.lm_head.weight)
    assert not torch.equal(held.model.lm_head.weight, moved.actor.lm_head.weight)


def test_a_loaded_policy_decodes_the_same_tokens(envs: RLHFVectorEnv, tmp_path: Path) -> None:
    policy = policy_of(envs, moved=True)
    policy.save(tmp_path)
    other = policy_of(envs)
    other.load(tmp_path)
    prompts = [envs.engine.prompts[i % 6] for i in range(12)]
    runs = [collect(envs, p, prompts, Sampler(), torch.Generator().manual_seed(5)) for p in (policy, other)]
    assert torch.equal(runs[0].response_ids, runs[1].response_ids)
    torch.testing.assert_close(runs[0].log_probs, runs[1].log_probs)
