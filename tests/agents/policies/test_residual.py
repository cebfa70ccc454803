"""The residual policy: log pi_ref + f, for every network f, on a table and on a Hugging Face model as the reference."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import gpt2, learn, shifted, word_tokenizer
from torch import Tensor

from agents.algorithms.ppo import PPO, PPOConfig
from agents.policies.actor_critic import ActorCritic, read_logits
from agents.policies.networks import Network
from agents.policies.residual import ResidualPolicy
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.kl import episode_kl
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.policy import CausalPolicy
from lmgym.models.sampling import Sampler
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.rewards.noise import NoisyReward
from lmgym.rollout import collect
from lmgym.tasks.base import Task

NETWORKS = get_args(Network)
WORDS = ["a", "b", "c", "d"]
PROMPTS = ["a", "b c", "d d a b"]
HORIZON = 6


def table() -> CausalLM:
    """A table over <eos> and four words."""
    return markov_lm(dirichlet_rows(np.random.default_rng(1), 5, 5, 1.0), WORDS)


def transformer() -> CausalLM:
    """A random GPT-2 shape over 7 tokens, which embeds three more."""
    tokenizer = word_tokenizer(WORDS)
    return CausalLM(
        freeze(gpt2(len(tokenizer) + 3, n_embd=8, n_layer=1, n_head=2, n_positions=24, scale=0.1)), tokenizer
    )


REFERENCES = {"table": table, "transformer": transformer}


def count_b(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(completion.split().count("b")) for completion in completions]


def envs_of(lm: CausalLM, num_envs: int = 1, reward: Any = count_b, **task: Any) -> RLHFVectorEnv:
    fields = {"kl_coef": 0.3, "max_new_tokens": HORIZON} | task
    made = Task(name="tiny", model=lm, reward=reward, prompts={"train": PROMPTS}, **fields)
    return RLHFVectorEnv(num_envs, autoreset_mode="SameStep", task=made, device="cpu", prompt_order="sequential")


def ppo(envs: RLHFVectorEnv | None = None, *, seed: int = 0, **config: Any) -> PPO:
    config = {"batch_size": 24, "epochs": 2, "minibatches": 2, "lr": 1e-3, "width": 16, "policy": "mlp"} | config
    return PPO(envs or envs_of(table()), PPOConfig(**config), seed=shifted(seed))


def policy_of(lm: CausalLM, network: Network, *, moved: bool = True, **shape: Any) -> ResidualPolicy:
    """A residual; `moved` shifts every parameter, as in the midst of training."""
    policy = ResidualPolicy(lm, network, **{"width": 16, "layers": 2, "positions": 4 + HORIZON} | shape)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def sampled(envs: RLHFVectorEnv, policy: Any) -> Episodes:
    envs.reset(seed=0)
    batch = collect(envs, policy, 24, generator=torch.Generator().manual_seed(1))
    assert len(set(batch.lengths.tolist())) > 2  # ragged, or it would test little
    return batch


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    return request.param


@pytest.fixture(params=REFERENCES)
def lm(request: pytest.FixtureRequest) -> CausalLM:
    return REFERENCES[request.param]()


# -- the start -------------------------------------------------------------------------------------------------------


def test_at_first_the_distribution_is_the_references_to_the_bit(lm: CausalLM, network: Network) -> None:
    policy = policy_of(lm, network, moved=False)
    envs = envs_of(lm)
    episodes = sampled(envs, policy)
    assert torch.equal(policy.read(episodes).logits, read_logits(lm, episodes))
    assert torch.equal(policy.values(episodes), torch.zeros_like(episodes.log_probs))
    assert torch.equal(policy.next_values(episodes), torch.zeros(len(episodes)))
    reference = sampled(envs, CausalPolicy(lm))
    assert torch.equal(reference.response_ids, episodes.response_ids)
    assert torch.equal(reference.log_probs, episodes.log_probs)
    assert episode_kl(episodes).abs().max() < 1e-5


def test_at_first_the_kl_is_zero_and_the_ratio_one(lm: CausalLM, network: Network) -> None:
    agent = ppo(envs_of(lm), policy=network, epochs=1, minibatches=1)
    first, second = learn(agent, 2)
    assert first["rollout/exact_kl"] == 0.0
    assert abs(first["rollout/kl"]) < 1e-5
    assert first["train/clip_fraction"] == 0
    for metrics in (first, second):
        assert metrics["train/ratio_error"] < 1e-5
    assert second["rollout/exact_kl"] > 0


def test_ids_without_a_word_keep_probability_zero(network: Network) -> None:
    lm = transformer()
    policy = policy_of(lm, network)
    episodes = sampled(envs_of(lm), policy)
    lm.holes = [4]
    logits = policy.read(episodes).logits
    assert logits.shape[1] == lm.vocab_size == 7
    assert (logits[:, 4] == -torch.inf).all()
    assert logits[:, [0, 1, 2, 3, 5, 6]].isfinite().all()
    logits.log_softmax(-1)[:, 3].sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


def test_the_reference_is_shared_frozen_and_no_part_of_the_weights(lm: CausalLM, network: Network) -> None:
    policy = policy_of(lm, network)
    kept = {id(p) for p in lm.model.parameters()}
    assert not kept & {id(p) for p in policy.parameters()}
    assert policy.reference is lm
    assert not any(p.requires_grad for p in lm.model.parameters())
    read = policy.read(sampled(envs_of(lm), policy))
    (read.logits.log_softmax(-1)[:, 3].sum() + read.values.sum()).backward()
    assert all(p.grad is None for p in lm.model.parameters())


def test_a_seed_gives_one_set_of_weights_and_no_global_generator_is_touched(network: Network) -> None:
    before = torch.get_rng_state()
    first, same, other = (policy_of(table(), network, moved=False, seed=seed).state_dict() for seed in (0, 0, 1))
    drawn = []
    for seed in (0, 1):
        agent = ppo(policy=network, seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))
    learn(agent, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == same.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(*drawn)  # an agent's seed is that of its weights


# -- the sum ---------------------------------------------------------------------------------------------------------


def test_logits_are_the_references_plus_the_networks(lm: CausalLM, network: Network) -> None:
    """f by hand: the head on the hidden state that the value head reads, of each episode alone."""
    policy = policy_of(lm, network)
    episodes = sampled(envs_of(lm), policy)
    with torch.no_grad():
        read = policy.read(episodes)
        reference = read_logits(lm, episodes)
        rows = episodes.response_mask.nonzero()[:, 0]
        for i in range(len(episodes)):
            p = int(episodes.prompt_mask[i].sum())
            ids = torch.cat([episodes.prompt_ids[i][episodes.prompt_mask[i]], episodes.response_ids[i]])[None]
            columns = torch.arange(int(episodes.lengths[i])) + p - 1
            hidden, _ = policy.network.hidden_at(ids, torch.zeros_like(columns), columns)
            f = hidden @ policy.network.head.weight.T
            finite = reference[rows == i] > -torch.inf
            residual = (read.logits - reference)[rows == i]
            torch.testing.assert_close(residual[finite], f[finite], rtol=0, atol=1e-5)
            value = hidden @ policy.value_head.weight[0] + policy.value_head.bias
            torch.testing.assert_close(read.values[rows == i], value, rtol=0, atol=1e-5)
    assert f.std() > 0.02


def test_the_network_sees_the_order_of_tokens_and_their_place(network: Network) -> None:
    policy = policy_of(table(), network)
    ids = torch.tensor([[1, 2, 3, 4, 1, 1], [2, 1, 3, 4, 1, 1], [0, 1, 2, 3, 4, 1], [1, 2, 3, 4, 2, 2]])
    lengths = torch.tensor([4, 4, 5, 4])
    with torch.no_grad():
        plain, swapped, shifted, same = policy.next_logits(ids, lengths)
    assert (plain - swapped).abs().max() > 1e-3  # beyond what the table can see
    assert (plain - shifted).abs().max() > 1e-3
    torch.testing.assert_close(plain, same, rtol=0, atol=1e-5)  # not what comes after


# -- decoding --------------------------------------------------------------------------------------------------------


def left_padded(rows: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
    """Sequences on the right of (n, width), with tokens of the vocabulary as their padding."""
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return ids, mask


def check_decoded(policy: ResidualPolicy, state: Any, rows: list[list[int]]) -> None:
    """What is decoded is what one forward over each sequence alone gives."""
    with torch.no_grad():
        for i, row in enumerate(rows):
            ids = torch.tensor([row])
            position = torch.tensor([len(row) - 1])
            logits, values, _ = policy.read_at(ids, torch.zeros(1, dtype=torch.int64), position)
            torch.testing.assert_close(state.logits[i], logits[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(state.values[i], values[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", [30, 10])
def test_decoding_is_a_forward_over_all_that_came_before(lm: CausalLM, network: Network, positions: int) -> None:
    """With ragged prompts, rows that leave, and rows that start anew in mid-air; beyond the window of the mlp."""
    policy = policy_of(lm, network, positions=positions)
    steps = positions - 4 if lm.max_positions is None else min(positions, lm.max_positions) - 4
    rows = [[1], [3, 4], [4, 1, 3, 1], [1, 1, 4]]
    generator = torch.Generator().manual_seed(0)
    state = policy.begin(*left_padded(rows, 5), steps)
    check_decoded(policy, state, rows)
    for t in range(steps):
        if t == 2:
            kept = [3, 0, 2]
            state.keep(torch.tensor(kept))
            rows = [rows[i] for i in kept]
            check_decoded(policy, state, rows)
        if t == 4:
            state.begin(torch.tensor([2, 0]), *left_padded([[3, 3], [4]], 3))
            rows[2] = [3, 3]
            rows[0] = [4]
            check_decoded(policy, state, rows)
        tokens = torch.randint(3, 5, (len(rows),), generator=generator)
        state.step(tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
        check_decoded(policy, state, rows)


def test_what_collects_is_what_is_read(lm: CausalLM, network: Network) -> None:
    policy = policy_of(lm, network)
    episodes = sampled(envs_of(lm), policy)
    log_pi = policy.read(episodes).logits.detach().log_softmax(-1)
    chosen = episodes.response_ids[episodes.response_mask]
    expected = log_pi.gather(1, chosen[:, None]).squeeze(1)
    torch.testing.assert_close(episodes.log_probs[episodes.response_mask], expected, rtol=0, atol=1e-5)
    assert episodes.values is not None
    torch.testing.assert_close(episodes.values, policy.values(episodes), rtol=0, atol=1e-5)
    assert episode_kl(episodes).abs().max() > 0.1


def test_a_row_does_not_feel_its_batch_mates_or_its_padding(lm: CausalLM, network: Network) -> None:
    policy = policy_of(lm, network)
    episodes = sampled(envs_of(lm), policy)
    wide = replace(
        episodes,
        prompt_ids=torch.nn.functional.pad(episodes.prompt_ids, (3, 0), value=4),
        prompt_mask=torch.nn.functional.pad(episodes.prompt_mask, (3, 0), value=False),
    )
    with torch.no_grad():
        together = policy.read(episodes)
        after = policy.next_values(episodes)
        for one, other in zip(policy.read(wide), together, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        rows = episodes.response_mask.nonzero()[:, 0]
        for i in range(len(episodes)):
            few = episodes[[i]].trimmed()
            alone = policy.read(few)
            torch.testing.assert_close(alone.logits, together.logits[rows == i], rtol=0, atol=1e-5)
            torch.testing.assert_close(alone.values, together.values[rows == i], rtol=0, atol=1e-5)
            torch.testing.assert_close(policy.next_values(few)[0], after[i], rtol=0, atol=1e-5)


def test_a_prompt_that_is_too_long_is_refused(network: Network) -> None:
    policy = policy_of(table(), network)
    policy.begin(*left_padded([[1] * 4], 20), HORIZON)  # padding does not count
    with pytest.raises(InvalidArgumentError, match="must fit into 10 positions, got 11"):
        policy.begin(*left_padded([[1] * 5], 20), HORIZON)


# -- learning --------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter_after_one_step(network: Network) -> None:
    """The last layer is zero at first, and passes nothing on; one step later it does."""
    agent = ppo(policy=network, minibatches=1, epochs=2)
    at_first: dict[str, float] = {}
    learn(agent, 1)
    for name, p in agent.policy.named_parameters():
        assert p.grad is not None, name
        at_first[name] = p.grad.norm().item()
    # Each embedding of a place that is no place of a response (and the last) stays at 0; the whole of them does not.
    assert min(at_first.values()) > 0, at_first


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
def test_ppo_learns_with_every_network(reference: str, network: Network) -> None:
    agent = ppo(envs_of(REFERENCES[reference]()), policy=network, batch_size=64, epochs=4, lr=1e-2)
    history = learn(agent, 8)
    returns = [metrics["rollout/return"] for metrics in history]
    assert np.mean(returns[-3:]) > returns[0] + 0.5
    assert history[-1]["rollout/exact_kl"] > 0.3
    assert all(math.isfinite(x) for metrics in history for x in metrics.values())


@pytest.mark.parametrize("variant", [{"truncate": True, "gamma": 0.9}, {"dense_kl": False}], ids=str)
def test_variants_of_the_problem_train_step_by_step(variant: dict[str, Any], network: Network) -> None:
    agent = ppo(envs_of(table(), num_envs=24, **variant), policy=network, collect="steps")
    for metrics in learn(agent, 2):
        assert metrics["train/ratio_error"] < 1e-5


# -- disk, and acting ------------------------------------------------------------------------------------------------


def test_a_saved_policy_is_read_back(lm: CausalLM, network: Network, tmp_path: Path) -> None:
    policy = policy_of(lm, network)
    other = policy_of(lm, network, moved=False, seed=4)
    policy.save(tmp_path)
    assert json.loads((tmp_path / "residual.json").read_text())["network"] == network
    other.load(tmp_path)
    own = other.state_dict()
    saved = policy.state_dict()
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], saved[name]) for name in saved)
    envs = envs_of(lm)
    torch.testing.assert_close(sampled(envs, policy).log_probs, sampled(envs, other).log_probs)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="must hold a residual of shape .* got None"):
        policy_of(table(), "mlp").load(tmp_path)
    policy_of(table(), "gru").save(tmp_path)
    for other in (policy_of(table(), "mlp"), policy_of(table(), "gru", width=8)):
        with pytest.raises(InvalidArgumentError, match="must hold a residual of shape .* got .*'gru'"):
            other.load(tmp_path)


@pytest.mark.slow
def test_a_resumed_run_is_the_run(network: Network, tmp_path: Path) -> None:
    """To the last bit, the noise of the reward included."""

    def agent() -> PPO:
        return ppo(envs_of(table(), reward=NoisyReward(count_b, 1.0, seed=2)), policy=network)

    whole = learn(agent(), 4, total=500)
    first = agent()
    second = agent()
    curve = learn(first, 2, total=500)
    first.save(tmp_path / "checkpoint")
    learn(first, 1, total=500)  # what comes after the checkpoint is lost with the process
    learn(second, 1, total=500)  # and a loaded agent forgets what it was
    second.load(tmp_path / "checkpoint")
    assert curve + learn(second, 2, total=500) == whole


def test_predict_chooses_from_the_sum(network: Network) -> None:
    envs = envs_of(table())
    agent = ppo(envs, policy=network)
    agent.policy = policy_of(envs.engine.lm, network)
    prompt = envs.engine.prompts[1].ids
    response = (1, 2, 2, 4)
    ids = np.zeros((5, envs.engine.width + HORIZON), np.int64)
    mask = np.zeros(ids.shape, np.int8)
    distributions = []
    for n in range(5):
        so_far = [*prompt, *response[:n]]
        ids[n, envs.engine.width - 2 : envs.engine.width + n] = so_far
        mask[n, envs.engine.width - 2 : envs.engine.width + n] = 1
        with torch.no_grad():
            distributions.append(agent.policy.next_logits(torch.tensor([so_far]), torch.tensor([len(so_far)]))[0])
    shown = {"input_ids": ids, "attention_mask": mask}
    best = [int(distribution.argmax()) for distribution in distributions]
    assert agent.predict(shown, deterministic=True)[0].tolist() == best
    assert int(agent.predict({name: x[3] for name, x in shown.items()}, deterministic=True)[0]) == best[3]
    draws = np.stack([agent.predict(shown)[0] for _ in range(300)])
    for n, distribution in enumerate(distributions):
        assert (
            np.abs(np.bincount(draws[:, n], minlength=5) / 300 - distribution.softmax(-1).numpy()).max()
            < 4 * 0.5 / 300**0.5
        )


# -- what is asked for -----------------------------------------------------------------------------------------------


def test_auto_is_a_residual_on_a_table_and_a_copy_of_any_other_reference() -> None:
    on_table = ppo(policy="auto").policy
    assert isinstance(on_table, ResidualPolicy)
    assert on_table.shape["network"] == "transformer"
    assert isinstance(ppo(envs_of(transformer()), policy="auto").policy, ActorCritic)
    assert isinstance(ppo(envs_of(transformer()), policy="gru").policy, ResidualPolicy)


def test_width_and_layers_are_those_of_the_network() -> None:
    small = ppo(policy="transformer")
    large = ppo(policy="transformer", width=40, layers=3)
    assert large.policy.network.model.config.n_layer == 3
    assert large.policy.value_head.in_features == 40
    sizes = [sum(p.numel() for p in agent.policy.parameters()) for agent in (small, large)]
    assert sizes[0] < sizes[1]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"`policy` must be .*'transformer', 'gru', 'mlp'.*cannot learn"):
        ppo(policy="finetune")
    for kind in ("auto", *NETWORKS):
        with pytest.raises(InvalidArgumentError, match="`critic` must be 'shared' where the policy is a residual"):
            ppo(policy=kind, critic="reference")
    with pytest.raises(UnknownNameError, match="`policy` must be one of .*'gru'.*got 'gur'.*'gru'"):
        PPOConfig(policy="gur")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="`width` must be an int >= 1"):
        PPOConfig(width=0)
    with pytest.raises(InvalidArgumentError, match="`layers` must be an int >= 1"):
        PPOConfig(layers=0)
    with pytest.raises(UnknownNameError, match="`network` must be one of"):
        ResidualPolicy(table(), "lstm", positions=8)  # type: ignore[arg-type]


def test_a_temperature_is_of_the_sum(network: Network) -> None:
    envs = envs_of(table())
    agent = PPO(envs, PPOConfig(policy=network, batch_size=24, width=16), sampler=Sampler(temperature=0.7))
    for metrics in learn(agent, 2):
        assert metrics["train/ratio_error"] < 1e-5
