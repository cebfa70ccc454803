"""The bridge to Stable-Baselines3 against its own vector envs, the reference and plain forwards."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TinyProblem, gpt2, shifted, table_reward, word_tokenizer
from extras import needs_contrib
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import VectorWrapper
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from agents.agent import TokenCount
from agents.policies.actor_critic import ActorCritic
from agents.sb3 import algorithms
from agents.sb3.agent import SB3Agent
from agents.sb3.buffers import StretchReplayBuffer
from agents.sb3.config import SB3Config
from agents.sb3.network import Trunk
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, UnknownNameError
from lmgym.evaluation import evaluate
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.sampling import Sampler
from lmgym.optimum.tree import Tree
from lmgym.sb3 import VecEnvBridge
from lmgym.tasks import make_task
from lmgym.tasks.base import Task
from lmgym.wrappers import VectorActionMask

OFF_POLICY: dict[str, Any] = {"buffer_size": 1000, "learning_starts": 64}
SMALL: dict[str, dict[str, Any]] = {
    "PPO": {"batch_size": 64, "n_epochs": 2},
    "A2C": {},
    "DQN": {"kwargs": OFF_POLICY},
    "TRPO": {"kwargs": {"cg_max_steps": 1}, "policy": "mlp", "layers": 1, "n_steps": 32},
    "QRDQN": {"kwargs": {**OFF_POLICY, "policy_kwargs": {"n_quantiles": 4}}},
    "MaskablePPO": {"batch_size": 64, "n_epochs": 2},
    "RecurrentPPO": {"batch_size": 64, "n_epochs": 2, "kwargs": {"policy_kwargs": {"lstm_hidden_size": 8}}},
}
ALGORITHMS = [pytest.param(name, marks=[needs_contrib] if name in algorithms.CONTRIB else []) for name in SMALL]
ON_POLICY = [p for p in ALGORITHMS if p.values[0] not in algorithms.VALUE_BASED]


@functools.cache
def tiny_lm() -> CausalLM:
    """A random GPT-2 of one layer with 7 tokens."""
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    return CausalLM(freeze(gpt2(len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=16)), tokenizer)


def tiny_envs(rows: int = 8, **changes: Any) -> RLHFVectorEnv:
    """The token MDP over the tiny model, with at most three tokens a response."""
    settings = {name: changes.pop(name) for name in ("autoreset_mode", "obs_format") if name in changes}
    fields = {"reward": table_reward, "prompts": {"train": ["a", "b c", "d d a"]}, "kl_coef": 0.3, "max_new_tokens": 3}
    task = Task(**{"name": "tiny", "model": tiny_lm(), **fields, **changes})
    return RLHFVectorEnv(rows, **{"autoreset_mode": "SameStep", "task": task, "device": "cpu", **settings})


def keyword_envs(rows: int = 8) -> RLHFVectorEnv:
    return RLHFVectorEnv(rows, autoreset_mode="SameStep", task="keyword-8", device="cpu")


def make(algorithm: str = "PPO", envs: RLHFVectorEnv | None = None, *, seed: int = 0, **config: Any) -> SB3Agent:
    envs = envs or tiny_envs()
    config = {"n_envs": envs.num_envs, "n_steps": 16, "width": 8, "layers": 1} | SMALL[algorithm] | config
    return SB3Agent(envs, SB3Config(algorithm=algorithm, **config), seed=shifted(seed))


def learn(agent: SB3Agent, total: int) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    agent.learn(total, lambda step, metrics: history.append({"step": step, **metrics}))
    return history


def weights(agent: SB3Agent) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.model.policy.parameters()])


def moved(agent: SB3Agent, scale: float = 0.3) -> SB3Agent:
    """The agent with every weight moved, as in the midst of training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in agent.model.policy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    agent.model.policy.set_training_mode(False)
    return agent


def next_log_probs(lm: CausalLM, ids: Any, mask: Any) -> Tensor:
    """(V,) log-probs of the token after one observation: a plain forward over its tokens."""
    tokens = torch.tensor(np.asarray(ids)[np.asarray(mask).astype(bool)].astype(int))[None]
    with torch.no_grad():
        return lm.model(input_ids=tokens).logits[0, -1, : lm.vocab_size].log_softmax(-1)


# -- the bridge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("kl_coef", [0.2, 0.0])
def test_the_bridge_is_a_dummy_vec_env_over_single_envs(parts: Any, truncate: bool, kl_coef: float) -> None:
    n = 3
    settings = {**parts, "truncate": truncate, "kl_coef": kl_coef, "device": "cpu"}
    bridge = VecEnvBridge(RLHFVectorEnv(n, autoreset_mode="SameStep", **settings))
    dummy = DummyVecEnv([lambda: gym.make("lmgym/RLHF-v0", **settings) for _ in range(n)])
    assert (bridge.observation_space, bridge.action_space) == (dummy.observation_space, dummy.action_space)
    rng = np.random.default_rng(0)
    endings = set()
    for vec in (bridge, dummy):
        vec.seed(5)
    assert data_equivalence(dict(bridge.reset()), dict(dummy.reset()))
    assert bridge.reset_infos == dummy.reset_infos
    for _ in range(30):
        actions = rng.choice([1, 3, 4, 5, 6, 7], n, p=[0.1, 0.2, 0.2, 0.2, 0.2, 0.1])
        ours = bridge.step(actions)
        theirs = dummy.step(actions)
        assert data_equivalence(dict(ours[0]), dict(theirs[0]))
        assert ours[1].dtype == np.float32
        assert ours[1].flags.writeable
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
        assert ours[2].dtype == bool
        assert (ours[2] == theirs[2]).all()
        for mine, other in zip(ours[3], theirs[3], strict=True):
            assert mine.keys() == other.keys()
            for name, value in other.items():
                assert type(mine[name]) is type(value), name
                if isinstance(value, float):
                    assert mine[name] == pytest.approx(value, abs=1e-5), name
                else:
                    assert data_equivalence(mine[name], value), name
            assert data_equivalence(bridge.reset_infos, dummy.reset_infos)
            endings |= {(mine.get("finish_reason"), mine["TimeLimit.truncated"])}
    assert endings == {("", False), ("eos", False), ("length", truncate)}


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_another_autoreset_is_refused(mode: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`autoreset_mode` must be 'SameStep', .* got '{mode}'"):
        VecEnvBridge(tiny_envs(autoreset_mode=mode))


class Masked(VectorWrapper):
    """Allows every row two tokens of its own."""

    def action_masks(self) -> Any:
        masks = np.zeros((self.num_envs, 7), dtype=bool)
        for row in range(self.num_envs):
            masks[row, [1, 3 + row]] = True
        return masks


def test_attributes_and_methods_reach_the_env_and_its_wrappers() -> None:
    envs = tiny_envs(3)
    bridge = VecEnvBridge(Masked(envs))
    assert bridge.get_attr("kl_coef") == [0.3] * 3
    assert bridge.get_attr("kl_coef", [0, 2]) == [0.3] * 2
    assert bridge.has_attr("action_masks")
    assert not bridge.has_attr("no_such")
    bridge.set_attr("note", "x")
    assert (envs.note, bridge.get_attr("note")) == ("x", ["x"] * 3)  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgumentError, match="`indices` must be all rows"):
        bridge.set_attr("note", "y", 0)
    assert bridge.env_is_wrapped(Masked, [0]) == [True]
    assert bridge.env_is_wrapped(gym.wrappers.vector.RecordEpisodeStatistics) == [False] * 3
    assert [list(np.flatnonzero(row)) for row in bridge.env_method("action_masks", indices=[0, 2])] == [[1, 3], [1, 5]]
    assert bridge.env_method("next_prompts", 2)[0][0].text in ("a", "b c", "d d a")
    assert np.all(VecEnvBridge(envs).env_method("action_masks"))
    assert bridge.render_mode is None


def test_seeds_and_options_hold_for_the_next_reset() -> None:
    bridge = VecEnvBridge(tiny_envs(3))
    bridge.seed(4)
    first = bridge.reset()
    second = bridge.reset()
    bridge.seed(4)
    assert data_equivalence(dict(first), dict(bridge.reset()))
    assert data_equivalence(dict(second), dict(bridge.reset()))
    bridge.set_options({"prompt": "d d a"})
    assert (bridge.reset()["attention_mask"].sum(1) == 3).all()
    bridge.set_options([{"prompt": "a"}, {}, {}])
    with pytest.raises(InvalidArgumentError, match="`options` must be the same for every row"):
        bridge.reset()


def test_the_single_env_passes_the_check_of_sb3() -> None:
    check_env(gym.make("lmgym/RLHF-v0", task="keyword-8", device="cpu").unwrapped)


# -- where it starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envs", [tiny_envs, keyword_envs])
@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_the_first_policy_is_the_reference_and_its_values_are_0(algorithm: str, envs: Any) -> None:
    agent = make(algorithm, envs(), **({"policy": "auto"} if envs is tiny_envs else {}))
    lm = agent.envs.engine.lm
    seen = 0
    agent.envs.reset(seed=0)
    observation = agent.envs.step(np.full(8, 3))[0]
    logits = agent.next_logits(*(torch.from_numpy(observation[k]) for k in ("input_ids", "attention_mask")))
    for row in range(8):
        if observation["attention_mask"][row, -agent.envs.engine.horizon :].any():
            seen += 1
        expected = next_log_probs(lm, observation["input_ids"][row], observation["attention_mask"][row])
        torch.testing.assert_close(logits[row].log_softmax(-1), expected, atol=1e-5, rtol=0)
    assert seen
    bare = {"kwargs": {**SMALL[algorithm].get("kwargs", {}), "normalize_advantage": False}}
    agent = make(algorithm, envs(), learning_rate=0.0, **bare, **({"policy": "auto"} if envs is tiny_envs else {}))
    metrics = learn(agent, 16 * 8)[0]
    assert not agent.model.rollout_buffer.values.any()
    assert abs(metrics["rollout/kl"]) < 1e-4
    assert abs(metrics["rollout/return"] - metrics["rollout/score"]) < 1e-4
    assert abs(metrics.get("train/approx_kl", 0.0)) < 1e-6  # the ratio is 1, as TRPO's is before its step
    assert metrics.get("train/clip_fraction", 0.0) == 0.0


def test_the_copy_of_the_model_is_left_as_it_is() -> None:
    """SB3's own initialisation would draw most of it anew."""
    agent = make()
    ours = agent.policy.lm.model.state_dict()
    theirs = agent.envs.engine.lm.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor)
        assert ours[name].data_ptr() != tensor.data_ptr()


def test_dropout_stays_off() -> None:
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    model = gpt2(len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=16)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    agent = make(envs=tiny_envs(model=CausalLM(freeze(model), tokenizer)), learning_rate=0.0)
    metrics = learn(agent, 128)[0]
    assert abs(metrics["train/approx_kl"]) < 1e-6
    agent.model.policy.set_training_mode(True)
    assert not any(m.training for m in agent.model.policy.features_extractor.modules())


# -- how it reads ------------------------------------------------------------------------------------------------------


def observed(rows: list[list[int]], generator: torch.Generator, columns: int = 9) -> dict[str, Tensor]:
    """Sequences as observations with gaps at random."""
    ids = torch.zeros(len(rows), columns, dtype=torch.int64)
    mask = torch.zeros(len(rows), columns, dtype=torch.int64)
    for i, row in enumerate(rows):
        positions = torch.randperm(columns, generator=generator)[: len(row)].sort().values
        ids[i, positions] = torch.tensor(row, dtype=torch.int64)
        mask[i, positions] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("heads", "hidden"), [(True, False), (False, True), (True, True)])
def test_sequences_that_begin_one_another_are_read_together_as_if_alone(heads: bool, hidden: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 7, (int(n),), generator=generator).tolist() for n in torch.arange(1, 7).repeat(4)]
    rows = [[3], [3, 4], [3, 4, 5], [4], [3, 4, 5, 6], [3, 5], [3, 4], *drawn, *(row[:-1] or row for row in drawn)]
    space = tiny_envs().single_observation_space
    tokens = TokenCount()
    trunk = Trunk(space, lambda: ActorCritic(tiny_lm()), heads, hidden, tokens)
    torch.nn.init.normal_(trunk.policy.value_head.weight, generator=generator)
    trunk.train()
    weight = torch.randn(len(rows), trunk.features_dim, generator=generator)
    together = trunk(observed(rows, generator))
    gradient = torch.autograd.grad((together * weight).sum(), trunk.policy.actor.transformer.wte.weight)[0]
    distinct = {tuple(row) for row in rows}
    read = [row for row in distinct if not any(len(o) > len(row) and o[: len(row)] == row for o in distinct)]
    assert tokens == TokenCount(*[sum(map(len, read))] * 2)
    alone = torch.cat([trunk(observed([row], generator)) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    expected = torch.autograd.grad((alone * weight).sum(), trunk.policy.actor.transformer.wte.weight)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=0)


def test_a_padded_batch_of_no_tokens_can_be_read() -> None:
    """RecurrentPPO fills its sequences up with observations of zeros."""
    trunk = Trunk(tiny_envs().single_observation_space, lambda: ActorCritic(tiny_lm()), True, True, TokenCount())
    trunk.train()
    generator = torch.Generator().manual_seed(0)
    with_empty, without = (trunk(observed(rows, generator)) for rows in ([[], [3, 4], []], [[3, 4]]))
    torch.testing.assert_close(with_empty[1], without[0], atol=1e-5, rtol=0)
    assert trunk(observed([[], []], generator)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("filled", [5, 12, 17])
@pytest.mark.parametrize("stretch", [1, 4])
def test_the_replay_buffer_draws_stretches_of_a_row(stretch: int, filled: int) -> None:
    """Each number says its step and row: step * 10 + row."""
    n = 3
    size = 12
    spaces = tiny_envs(n).single_observation_space, tiny_envs(n).single_action_space
    buffer = StretchReplayBuffer(n * size, *spaces, device="cpu", n_envs=n, stretch=stretch)
    columns = spaces[0]["input_ids"].shape[0]  # type: ignore[index]
    for step in range(filled):
        number = step * 10 + np.arange(n)
        before, after = (
            {"input_ids": np.tile(x[:, None], columns), "attention_mask": np.ones((n, columns))}
            for x in (number, number + 10)
        )
        late = [{"TimeLimit.truncated": step % 3 == 2} for _ in range(n)]
        buffer.add(before, after, number, number / 2, np.full(n, step % 3 != 0), late)  # type: ignore[arg-type]
    np.random.seed(0)  # noqa: NPY002 - what SB3 draws from
    counts = np.zeros((filled, n))
    for _ in range(200):
        drawn = buffer.sample(90)  # the last stretch of 4 is cut
        numbers = drawn.actions[:, 0].long()
        assert drawn.observations["input_ids"][:, 0].tolist() == numbers.tolist()
        assert drawn.next_observations["input_ids"][:, 0].tolist() == (numbers + 10).tolist()
        assert drawn.rewards[:, 0].tolist() == (numbers / 2).tolist()
        steps = numbers // 10
        rows = numbers % 10
        assert drawn.dones[:, 0].tolist() == (steps % 3 == 1).float().tolist()  # % 3 == 2 ran out of time
        assert len(numbers) == 90
        assert (steps >= filled - size).all()
        for start in range(0, 90, stretch):
            some = steps[start : start + stretch].numpy()
            on = rows[start : start + stretch]
            assert (on == on[0]).all()
            assert ((some - some[0]) % min(filled, size) == np.arange(len(some))).all()
        np.add.at(counts, (steps.numpy(), rows.numpy()), 1)
    expected = 200 * 90 / (min(filled, size) * n)
    assert np.abs(counts[max(0, filled - size) :] / expected - 1).max() < 0.2


@pytest.mark.parametrize("stretch", [6, 8, 100])
@pytest.mark.parametrize("algorithm", ["PPO", pytest.param("MaskablePPO", marks=needs_contrib)])
def test_minibatches_of_a_rollout_are_stretches_of_a_row(algorithm: str, stretch: int) -> None:
    agent = make(algorithm, tiny_envs(4), n_steps=16, stretch=stretch, batch_size=32, learning_rate=0.0)
    learn(agent, 64)
    buffer = agent.model.rollout_buffer
    buffer.advantages[:, 0] = np.arange(64)  # row after row
    passes = []
    for _ in range(8):
        parts = list(buffer.get(32))
        assert [len(part.actions) for part in parts] == [32, 32]
        numbers = torch.cat([part.advantages for part in parts]).flatten().long()
        assert sorted(numbers.tolist()) == list(range(64))
        jumps = {n for before, n in itertools.pairwise([-9, *numbers.tolist()]) if n != before + 1}
        assert jumps <= {row * 16 + t for row in range(4) for t in range(0, 16, stretch)}
        taken = torch.from_numpy(buffer.actions[:, 0])[numbers]
        assert torch.equal(torch.cat([part.actions for part in parts]).flatten(), taken)
        passes.append(numbers.tolist())
    assert len({tuple(numbers) for numbers in passes}) > 1  # in a new order; four rows are in the old one by chance
    (whole,) = buffer.get(None)
    assert sorted(whole.advantages.flatten().tolist()) == list(range(64))


@needs_contrib
@pytest.mark.parametrize("policy", ["finetune", "gru"])
def test_one_backward_pass_gives_trpo_the_gradients_that_one_a_parameter_gives(policy: str) -> None:
    agent = moved(make("TRPO", policy=policy))
    model = agent.model
    model.policy.set_training_mode(True)
    generator = torch.Generator().manual_seed(0)
    observations = observed([[3, 4], [3, 4, 5], [6], [5, 5, 5]], generator)
    with torch.no_grad():
        old = model.policy.get_distribution(observations).distribution.logits.roll(1, 0)
    found = []
    for compute in (model._compute_actor_grad, super(type(model), model)._compute_actor_grad):
        with sdpa_kernel(SDPBackend.MATH):
            new = model.policy.get_distribution(observations).distribution
            kl = torch.distributions.kl_divergence(new, torch.distributions.Categorical(logits=old)).mean()
            params, objective, of_kl, shapes = compute(kl, new.logits[:, 3].mean())
            vector = torch.randn(objective.shape, generator=torch.Generator().manual_seed(1))
            found.append([objective, of_kl, model.hessian_vector_product(params, of_kl, vector)])
        assert [p.shape for p in params] == list(shapes)
    assert found[0][1].abs().max() > 1e-3
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# -- the reward --------------------------------------------------------------------------------------------------------


def stored(buffer: Any, array: Any) -> Any:
    """(T, N, ...) of what a buffer has laid out row after row to draw minibatches from."""
    return array.reshape(buffer.n_envs, buffer.buffer_size, *array.shape[1:]).swapaxes(0, 1)


def by_hand(agent: SB3Agent, dense: bool = True) -> tuple[Any, Any, list[float]]:
    """(T, N) rewards, log-probs, and the returns of whole episodes, from the buffer's observations and actions."""
    buffer = agent.model.rollout_buffer
    task = agent.envs.task
    lm = agent.envs.engine.lm
    actions = stored(buffer, buffer.actions)[..., 0]
    observations = {name: stored(buffer, array) for name, array in buffer.observations.items()}
    steps, rows = actions.shape[:2]
    rewards = np.zeros((steps, rows))
    log_probs = np.zeros((steps, rows))
    returns = []
    for i in range(rows):
        owed = 0.0
        total = 0.0
        for t in range(steps):
            ids, mask = (observations[name][t, i] for name in ("input_ids", "attention_mask"))
            action = int(actions[t, i])
            width = len(ids) - task.max_new_tokens
            log_probs[t, i] = next_log_probs(agent.policy.lm, ids, mask)[action]
            owed += task.kl_coef * (next_log_probs(lm, ids, mask)[action].item() - log_probs[t, i])
            response = [int(token) for token, on in zip(ids[width:], mask[width:], strict=True) if on] + [action]
            ended = action == lm.tokenizer.eos_token_id or len(response) == task.max_new_tokens
            if dense or ended:
                rewards[t, i] = owed
                owed = 0.0
            if ended:
                prompt = lm.decode([int(token) for token, on in zip(ids[:width], mask[:width], strict=True) if on])
                rewards[t, i] += table_reward([prompt], [""], [response])[0]
            total += rewards[t, i]
            if ended:
                returns.append(total)
                total = 0.0
    return rewards, log_probs, returns


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("algorithm", ["PPO", "A2C", pytest.param("MaskablePPO", marks=needs_contrib)])
def test_the_buffer_gets_both_halves_of_the_kl(algorithm: str, dense: bool) -> None:
    agent = moved(make(algorithm, tiny_envs(4, dense_kl=dense), learning_rate=0.0, n_steps=16))
    (metrics,) = learn(agent, 64)
    rewards, log_probs, returns = by_hand(agent, dense)
    buffer = agent.model.rollout_buffer
    np.testing.assert_allclose(stored(buffer, buffer.log_probs)[..., 0], log_probs, atol=1e-4)
    np.testing.assert_allclose(buffer.rewards, rewards, atol=1e-4)
    assert metrics["rollout/return"] == pytest.approx(np.mean(returns), abs=1e-4)
    kl = (metrics["rollout/score"] - metrics["rollout/return"]) / 0.3
    assert metrics["rollout/kl"] == pytest.approx(kl, abs=1e-3)
    assert metrics["rollout/kl"] > 0.05


def test_the_return_is_discounted() -> None:
    agent = make(envs=tiny_envs(gamma=0.5, kl_coef=0.0), learning_rate=0.0)
    (metrics,) = learn(agent, 128)
    buffer = agent.model.rollout_buffer
    returns = []
    assert agent.model.gamma == 0.5
    for i in range(8):
        start = 0
        for t in range(16):
            if t == 15 or buffer.episode_starts[t + 1, i]:
                if t < 15 or buffer.rewards[t, i] != 0:
                    returns.append(sum(0.5 ** (s - start) * buffer.rewards[s, i] for s in range(start, t + 1)))
                start = t + 1
    assert metrics["rollout/return"] == pytest.approx(np.mean(returns), abs=1e-5)
    assert "rollout/kl" not in metrics


@pytest.mark.parametrize("algorithm", ["DQN", pytest.param("QRDQN", marks=needs_contrib)])
def test_an_action_without_a_log_prob_is_a_point_mass(algorithm: str) -> None:
    agent = make(algorithm)
    metrics = learn(agent, 256)[-1]
    paid = metrics["rollout/score"] - 0.3 * metrics["rollout/kl"]  # with log pi = 0 the env's reward is all there is
    assert metrics["rollout/return"] == pytest.approx(paid, abs=1e-4)
    state = agent.policy.begin(torch.tensor([[3], [4]]), torch.ones(2, 1, dtype=torch.bool), 3)
    assert (state.logits.log_softmax(-1).amax(1) == 0).all()
    assert state.logits.isfinite().all()
    observation, _ = agent.envs.reset(seed=1)
    greedy, _ = agent.model.policy.predict(observation, deterministic=True)
    for deterministic in (True, False):
        assert (agent.predict(observation, deterministic)[0] == greedy).all()


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "PPO, on a table", "DQN, on a table"])
def test_every_algorithm_learns_from_what_it_does(algorithm: str, tmp_path: Path) -> None:
    """Some 250 steps, graded, saved, and loaded into an agent that then does the same."""
    algorithm, _, on_a_table = algorithm.partition(", ")
    envs = keyword_envs if on_a_table else tiny_envs
    agent = make(algorithm, envs(), seed=1, lr_schedule="constant")
    before = weights(agent)
    reference = [p.clone() for p in agent.envs.engine.lm.model.parameters()]
    history = learn(agent, 256)
    assert agent.num_timesteps == history[-1]["step"] == 256
    assert (weights(agent) - before).abs().max() > 1e-4
    assert all(torch.equal(p, q) for p, q in zip(reference, agent.envs.engine.lm.model.parameters(), strict=True))
    for metrics in history:
        assert {"rollout/return", "rollout/score", "rollout/kl", "rollout/length"} <= metrics.keys()
        assert all(math.isfinite(x) for name, x in metrics.items() if name.startswith("rollout/"))
        assert metrics["time/tokens_per_second"] > 0
    other = make(algorithm, envs(), seed=2)
    agent.save(tmp_path / "checkpoint")
    other.load(tmp_path / "checkpoint")
    assert torch.equal(weights(agent), weights(other))
    assert other.num_timesteps == 256
    graded = [evaluate(a.policy, a.envs, samples=2, generator=torch.Generator().manual_seed(0)) for a in (agent, other)]
    assert torch.equal(graded[0].episodes.response_ids, graded[1].episodes.response_ids)
    assert math.isfinite(graded[0].metrics["return"].mean)
    observation, _ = agent.envs.reset(seed=3)
    assert (agent.predict(observation)[0] == other.predict(observation)[0]).all()
    learn(other, 257)
    assert other.num_timesteps > 256


@pytest.mark.parametrize(
    ("algorithm", "policy"),
    [("PPO", "auto"), ("PPO", "gru"), ("A2C", "mlp"), pytest.param("TRPO", "mlp", marks=needs_contrib)],
)
def test_the_cache_says_what_a_forward_over_the_prefix_says(
    algorithm: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows that restart at different times, across updates, and a 1-row look at a truncated end."""
    whole = {} if algorithm == "A2C" else {"batch_size": 45}
    agent = moved(make(algorithm, tiny_envs(5, truncate=True), policy=policy, n_steps=9, learning_rate=0.01, **whole))
    decode = Trunk._decode
    calls = []
    rows = set()

    def checked(self: Trunk, ids: Tensor, mask: Tensor) -> Tensor:
        cached = decode(self, ids, mask)
        self._caches = False
        torch.testing.assert_close(cached, self.forward({"input_ids": ids, "attention_mask": mask}), atol=1e-4, rtol=0)
        self._caches = True
        calls.append(len(ids))
        rows.add(tuple(mask.sum(1).tolist()))
        return cached

    monkeypatch.setattr(Trunk, "_decode", checked)
    learn(agent, 90)
    assert set(calls) == {5}
    assert len(calls) >= 18
    assert len(rows) > 5


@pytest.mark.slow
def test_ppo_learns_an_easy_task() -> None:
    def count_b(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(completion.split().count("b")) for completion in completions]

    envs = tiny_envs(32, reward=count_b, kl_coef=0.1)
    agent = make(envs=envs, n_steps=8, learning_rate=0.01, batch_size=64, n_epochs=4)
    grades = []
    for total in (0, 2048):
        learn(agent, total)
        grades.append(evaluate(agent.policy, envs, samples=64, generator=torch.Generator().manual_seed(0)).metrics)
    assert grades[1]["return"].low > grades[0]["return"].high + 0.3


def test_a_falling_learning_rate_ends_at_0_where_the_last_rollout_goes_too_far() -> None:
    """SB3's remaining progress is below 0 there, and a negative rate would climb the loss."""
    agent = make(learning_rate=0.5)
    rates = []
    agent.learn(200, lambda step, metrics: rates.append((step, metrics["train/learning_rate"])))
    assert rates == [(128, pytest.approx(0.5 * (1 - 128 / 200))), (256, 0.0)]


@pytest.mark.slow
@needs_contrib
def test_the_critic_of_trpo_does_not_move_the_policy() -> None:
    numbers = {"n_critic_updates": 3, "cg_max_steps": 1, "target_kl": 1e-12}
    agent = make("TRPO", kwargs=numbers, lr_schedule="constant")
    before = {name: p.clone() for name, p in agent.model.policy.named_parameters()}
    learn(agent, 128)
    change = {name: (p - before[name]).abs().max().item() for name, p in agent.model.policy.named_parameters()}
    assert max(x for name, x in change.items() if "value" not in name) < 1e-5
    assert max(x for name, x in change.items() if "value" in name) > 1e-3


@pytest.mark.slow
@needs_contrib
def test_the_critic_of_trpo_is_known_by_its_place() -> None:
    """Not by its name, as sb3-contrib does: GPT-NeoX has a `query_key_value`."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **shape))
    numbers = {"n_critic_updates": 3, "cg_max_steps": 1, "target_kl": 1e-12}
    agent = make(
        "TRPO",
        tiny_envs(model=CausalLM(freeze(model), tokenizer)),
        policy="finetune",
        kwargs=numbers,
        lr_schedule="constant",
    )
    before = {name: p.clone() for name, p in agent.policy.named_parameters()}
    learn(agent, 128)
    change = {name: (p - before[name]).abs().max().item() for name, p in agent.policy.named_parameters()}
    assert all((x > 1e-5) == name.startswith("value_head") for name, x in change.items()), change
    agent.model.target_kl = 0.05
    learn(agent, 512)
    moved = agent.policy.get_parameter("actor.gpt_neox.layers.0.attention.query_key_value.weight")
    assert not torch.equal(moved, before["actor.gpt_neox.layers.0.attention.query_key_value.weight"])


@pytest.mark.parametrize(
    ("algorithm", "dense_kl"),
    [("PPO", True), ("PPO", False), ("A2C", True), pytest.param("MaskablePPO", True, marks=needs_contrib)],
)
def test_a_first_step_is_along_the_gradient_of_j(algorithm: str, dense_kl: bool) -> None:
    """Sampled, at lambda = 1: both halves of the KL are in the rewards, and J is what is climbed."""
    task = TinyProblem(horizon=2, kl_coef=0.3, dense_kl=dense_kl).task
    envs = RLHFVectorEnv(256, autoreset_mode="SameStep", task=task, split="train", device="cpu")
    numbers = {"gae_lambda": 1.0, "ent_coef": 0.0, "vf_coef": 0.0, "max_grad_norm": 1e9, "normalize_advantage": False}
    batch = {} if algorithm == "A2C" else {"batch_size": 256 * 32, "n_epochs": 1}
    config = {"n_steps": 32, "policy": "mlp", "learning_rate": 1e-4, "lr_schedule": "constant", **batch}
    agent = moved(make(algorithm, envs, kwargs=numbers, **config), 0.2)
    actor = agent._actor
    assert actor is not None
    with torch.no_grad():
        actor.value_head.weight.zero_()
        actor.value_head.bias.zero_()
    parameters = [p for p in actor.parameters() if p.requires_grad]
    tree = Tree.of(task, "train")
    _, exact = tree.gradient(lambda episodes: actor.read(episodes).logits, parameters)
    agent.model.policy.optimizer = torch.optim.SGD(agent.model.policy.parameters(), 1e-4)  # goes along the gradient
    before = [p.detach().clone() for p in parameters]
    learn(agent, 256 * 32)
    step = torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)]).double()
    right = torch.cat([g.flatten() for g in exact]).double()
    assert torch.nn.functional.cosine_similarity(step, right, dim=0) > 0.99


@needs_contrib
def test_maskable_ppo_takes_what_a_mask_of_its_own_allows() -> None:
    bridge = VecEnvBridge(Masked(tiny_envs(4)))
    model = importlib.import_module("sb3_contrib").MaskablePPO("MultiInputPolicy", bridge, n_steps=16, device="cpu")
    model.learn(64)
    assert set(np.unique(model.rollout_buffer.actions)) <= {1, 3, 4, 5, 6}
    with pytest.raises(InvalidArgumentError, match="`envs` must be masked by VectorActionMask, .* got Masked"):
        SB3Agent(Masked(tiny_envs(4)), SB3Config(algorithm="MaskablePPO", n_envs=4))  # type: ignore[arg-type]


@pytest.mark.slow
@needs_contrib
@pytest.mark.parametrize("mask", [{"top_k": 2}, {"top_p": 0.5}])
def test_what_maskable_ppo_does_under_a_mask_is_what_is_graded(mask: dict[str, Any], tmp_path: Path) -> None:
    """It plays, predicts and is graded on one distribution: its own, restricted to the tokens of the mask."""
    fields = {f"mask_{name}": value for name, value in mask.items()}
    agent = moved(make("MaskablePPO", learning_rate=0.0, **fields))
    history = learn(agent, 2048)  # nothing is learned, so that all its batches are of one policy
    lm = agent.envs.engine.lm
    observation = agent.envs.reset(seed=0)[0]
    logits = agent.next_logits(*(torch.from_numpy(observation[k]) for k in ("input_ids", "attention_mask")))
    for row in range(8):
        observed_row = (observation["input_ids"][row], observation["attention_mask"][row])
        kept = Sampler(**mask).adjust_logits(next_log_probs(lm, *observed_row)[None], 0)[0].isfinite()
        kept[1] = True  # EOS
        free = next_log_probs(agent._actor.lm, *observed_row)  # type: ignore[union-attr]
        expected = torch.where(kept, free, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(logits[row].log_softmax(-1), expected, atol=1e-5, rtol=0)
        assert not kept.all()
    for deterministic in (False, True):
        actions = agent.predict(observation, deterministic)[0]
        assert logits.gather(1, torch.as_tensor(actions)[:, None]).isfinite().all()
    graded = evaluate(agent.policy, agent.envs, samples=1000, generator=torch.Generator().manual_seed(0))
    for name in ("kl", "return", "score"):
        found = np.mean([metrics[f"rollout/{name}"] for metrics in history])
        assert abs(graded.metrics[name].mean - found) < 0.1, name
    agent.save(tmp_path / "checkpoint")
    again = make("MaskablePPO", seed=5, **fields)
    again.load(tmp_path / "checkpoint")
    assert np.array_equal(again.predict(observation, True)[0], agent.predict(observation, True)[0])
    with pytest.raises(InvalidArgumentError, match="mask_top_"):
        make("MaskablePPO").load(tmp_path / "checkpoint")


@needs_contrib
def test_a_mask_can_come_with_the_env() -> None:
    envs = tiny_envs()
    config = SB3Config(algorithm="MaskablePPO", n_envs=8, n_steps=16, batch_size=64)
    agent = SB3Agent(VectorActionMask(envs, top_k=2), config)  # type: ignore[arg-type]
    logits = agent.next_logits(*(torch.from_numpy(envs.reset(seed=0)[0][k]) for k in ("input_ids", "attention_mask")))
    assert set(logits.isfinite().sum(1).tolist()) <= {2, 3}
    with pytest.raises(InvalidArgumentError, match="`envs` must have no mask where mask_top_k or mask_top_p is given"):
        SB3Agent(VectorActionMask(envs, top_k=2), replace(config, mask_top_k=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": "PPO", "mask_top_k": 2}, "`mask_top_k` must be None for PPO, got 2"),
        ({"algorithm": "MaskablePPO", "mask_top_k": 0}, "`mask_top_k` must be an int >= 1, got 0"),
        ({"algorithm": "MaskablePPO", "mask_top_p": 1.5}, "`mask_top_p` must be"),
        ({"algorithm": "MaskablePPO", "mask_top_k": 2, "mask_top_p": 0.5}, "`mask_top_k` must be None beside"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SB3Config(**config)


def test_the_networks_of_dqn_are_two() -> None:
    networks = make("DQN").model.policy
    online, target = (
        {p.data_ptr() for p in network.parameters()} for network in (networks.q_net, networks.q_net_target)
    )
    assert not online & target


def test_a_run_is_its_seed_and_leaves_the_generators_of_the_process_alone() -> None:
    runs = []
    for seed in (0, 0, 1):
        outside = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
        agent = make(seed=seed)
        learn(agent, 256)
        assert random.getstate() == outside[0]
        assert data_equivalence(np.random.get_state(legacy=False), outside[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), outside[2])
        torch.rand(1)
        runs.append(weights(agent))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# -- stopping, saving, loading -----------------------------------------------------------------------------------------


def test_a_callback_stops_a_run_that_can_go_on() -> None:
    agent = make()
    steps = []
    agent.learn(10_000, lambda step, metrics: steps.append(step) or len(steps) < 2)  # type: ignore[func-returns-value]
    assert steps == [128, 256]
    assert agent.num_timesteps == 256
    assert [row["step"] for row in learn(agent, 512)] == [384, 512]
    assert learn(agent, 512) == []


@pytest.mark.slow
def test_a_checkpoint_holds_no_pickle_and_its_actor_is_a_model(tmp_path: Path) -> None:
    agent = make()
    agent.learn(256, lambda step, metrics: agent.save(tmp_path / "checkpoint"))
    files = {file.name for file in (tmp_path / "checkpoint").iterdir()}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja"}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(actor(input_ids=ids).logits, agent.policy.lm.model(input_ids=ids).logits)
    other = make()
    other.load(tmp_path / "checkpoint")
    moments = [a.model.policy.optimizer.state_dict()["state"] for a in (agent, other)]
    assert moments[0].keys() == moments[1].keys() != set()
    for i, row in moments[0].items():
        for name, value in row.items():
            assert torch.equal(torch.as_tensor(value), moments[1][i][name])
    # Where they were in the streams of prompts and of random numbers, they are again.
    assert other.envs.get_state() == agent.envs.get_state()
    for trained in (agent, other):
        trained.model._last_obs = None
        trained._metrics.restart()
        learn(trained, 384)
    assert torch.equal(weights(agent), weights(other))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    make("A2C").save(tmp_path / "a2c")
    ppo = make("PPO")
    with pytest.raises(InvalidArgumentError, match="must hold a checkpoint with algorithm='PPO', got 'A2C'"):
        ppo.load(tmp_path / "a2c")


def test_a_single_observation_gets_a_single_action() -> None:
    agent = moved(make())
    observation, _ = agent.envs.reset(seed=0)
    several = agent.predict(observation, deterministic=True)[0]
    for row in range(8):
        one = {name: values[row] for name, values in observation.items()}
        action, state = agent.predict(one, deterministic=True)
        assert (action, state) == (several[row], None)
        assert action == next_log_probs(agent.policy.lm, one["input_ids"], one["attention_mask"]).argmax()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": "SAC"}, "`algorithm` must be one of"),
        ({"algorithm": "A2C", "n_epochs": 2}, "`n_epochs` must be None, for A2C has no such, got 2."),
        ({"algorithm": "DQN", "n_epochs": 2}, "`n_epochs` must be None"),
        ({"n_envs": 0}, "`n_envs` must be an int >= 1"),
        ({"learning_rate": -1.0}, "`learning_rate` must be a finite number >= 0"),
        ({"algorithm": "A2C", "stretch": 4}, "`stretch` must be None for A2C, got 4."),
        ({"algorithm": "DQN", "kwargs": {"n_steps": 3}}, "`kwargs.n_steps` must be 1, .* got 3."),
        ({"stretch": 0}, "`stretch` must be an int >= 1"),
        ({"policy": "copy"}, "`policy` must be one of"),
        ({"kwargs": 3}, "`kwargs` must be a mapping"),
        ({"kwargs": {"gae_lamda": 1}}, "`kwargs` must be one of .* Did you mean 'gae_lambda'?"),
        ({"kwargs": {"gamma": 0.9}}, "`kwargs` must be without 'gamma', which `env.gamma` sets."),
        ({"kwargs": {"batch_size": 3}}, "`kwargs` must be without 'batch_size', which `agent.batch_size` sets."),
        ({"kwargs": {"verbose": 1}}, "`kwargs` must be one of"),
        ({"kwargs": {"policy_kwargs": {"ortho_init": True}}}, "`kwargs.policy_kwargs` must be one of"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidArgumentError, UnknownNameError), match=message):
        SB3Config(**config)


def test_what_cannot_be_put_together_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`sampler` must be the policy's own distribution"):
        SB3Agent(tiny_envs(4), SB3Config(n_envs=4), sampler=Sampler(temperature=0.5))
    with pytest.raises(InvalidArgumentError, match="`envs` must have n_envs=4 rows, got 3"):
        SB3Agent(tiny_envs(3), SB3Config(n_envs=4))
    with pytest.raises(InvalidArgumentError, match="`obs_format` must be 'dict', got 'flat'"):
        SB3Agent(tiny_envs(3, obs_format="flat"), SB3Config(n_envs=3))
    with pytest.raises(InvalidArgumentError, match="`policy` must be 'auto' or one of .*, got 'finetune'"):
        make(envs=keyword_envs(), policy="finetune")
    lm = TinyProblem().lm
    lm.holes = [4]
    with pytest.raises(InvalidArgumentError, match="`algorithm` must be one that learns a policy, got 'DQN'"):
        make("DQN", tiny_envs(model=lm, prompts={"train": ["x"]}))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(algorithms.importlib, "import_module", missing)
    config = SB3Config(algorithm="TRPO", n_envs=2)  # can be read all the same
    with pytest.raises(InvalidArgumentError, match=r"needs the package sb3-contrib \(pip install sb3-contrib\)"):
        SB3Agent(tiny_envs(2), config)


RESUMED: list[Any] = [pytest.param(f"{p.values[0]}, where collecting fails", marks=p.marks) for p in ALGORITHMS]
RESUMED += ["PPO, between two rollouts", "PPO, paid at the end", "DQN, with a full buffer"]


@pytest.mark.parametrize("algorithm", RESUMED)
def test_an_interrupted_run_goes_on_to_the_same_curve(algorithm: str, tmp_path: Path) -> None:
    """Rollouts of 8 steps end within episodes of up to 32 tokens, which the resumed run goes on with."""
    algorithm, _, variant = algorithm.partition(", ")
    task = make_task("stop-16", dense_kl=variant != "paid at the end")
    size = 64 if variant == "with a full buffer" else 1000
    replay: dict[str, Any] = {"buffer_size": size, "learning_starts": 40, "train_freq": 2, "target_update_interval": 40}
    replay |= {"exploration_fraction": 1.0, "exploration_final_eps": 0.8}
    settings: dict[str, dict[str, Any]] = {"A2C": {}, "TRPO": {"batch_size": 32}}
    settings |= {name: {"batch_size": 32, "stretch": 4, "kwargs": replay} for name in algorithms.VALUE_BASED}
    sizes = settings.get(algorithm, {"batch_size": 32, "n_epochs": 1})

    def agent(seed: int) -> SB3Agent:
        envs = RLHFVectorEnv(4, autoreset_mode="SameStep", task=task, device="cpu")
        return make(algorithm, envs, seed=seed, policy="mlp", width=8, layers=1, n_steps=8, **sizes)

    def learn_until(made: SB3Agent, batches: int, fails: bool = False) -> list[dict[str, float]]:
        history: list[dict[str, float]] = []

        def keep(step: int, metrics: dict[str, float]) -> bool:
            history.append({k: x for k, x in metrics.items() if not k.startswith("time/")} | {"step": step})
            if fails and len(history) == batches:
                made.envs.unwrapped.step = fail_after_the_fourth(made.envs.unwrapped.step)  # type: ignore[method-assign]
            return fails or len(history) < batches

        made.learn(200, keep)
        return history

    whole = learn_until(agent(0), 6)
    first = agent(0)
    if variant == "where collecting fails":
        with pytest.raises(KeyError):
            learn_until(first, 3, fails=True)
        assert first.at_rest
        whole_rollouts = 8 if algorithm in algorithms.VALUE_BASED else 0  # steps: DQN's rollouts have 2 of each row
        assert first.num_timesteps == whole[2]["step"] + whole_rollouts
    else:
        learn_until(first, 3)
    assert bool((first.envs.unwrapped.engine.lengths > 0).any())  # there are episodes in hand
    first.save(tmp_path / "checkpoint")
    second = agent(1)
    second.load(tmp_path / "checkpoint")
    after = learn_until(second, 3)
    assert [row.keys() for row in after] == [row.keys() for row in whole[3:]]
    for found, expected in zip(after, whole[3:], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)


def fail_after_the_fourth(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An env's `step` that raises after its fourth step, within a rollout."""
    calls = itertools.count(1)

    def failing(actions: Any) -> Any:
        transition = step(actions)
        if next(calls) == 4:
            raise KeyError("the reward failed")
        return transition

    return failing


def test_a_replay_buffer_of_another_size_is_refused(tmp_path: Path) -> None:
    agent = make("DQN")
    learn(agent, 128)
    agent.save(tmp_path / "checkpoint")
    other = make("DQN", kwargs={**OFF_POLICY, "buffer_size": 64})
    with pytest.raises(InvalidArgumentError, match=r"`kwargs.buffer_size` and `n_envs` must be those of the run"):
        other.load(tmp_path / "checkpoint")


@pytest.mark.parametrize("algorithm", ["PPO", "DQN"])
def test_a_checkpoint_before_the_first_rollout_begins_as_a_new_run(algorithm: str, tmp_path: Path) -> None:
    first = make(algorithm)
    second = make(algorithm, seed=1)
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    for found, expected in zip(learn(second, 256), learn(first, 256), strict=True):
        assert found["rollout/return"] == pytest.approx(expected["rollout/return"], rel=1e-5)
