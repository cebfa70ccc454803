"""Wrappers that look at the reference or at the text: against plain forwards, and single against vector."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import COUNTS_SAME_STEP, WORDS, byte_tokenizer, gpt2, tiny_lm, word_tokenizer
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import Tensor
from transformers import MistralConfig

from lmgym.errors import InvalidActionError, InvalidArgumentError
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.sampling import Sampler
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.wrappers import (
    ActionMask,
    EmbeddingObservation,
    OneHotObservation,
    PolicyKL,
    TextObservation,
    TopKActions,
    VectorActionMask,
    VectorEmbeddingObservation,
    VectorOneHotObservation,
    VectorPolicyKL,
    VectorTextObservation,
    VectorTopKActions,
)

ID = "lmgym/RLHF-v0"
EOS = 1
V = len(WORDS) + 3
P = 6
T = 8
N = 3
K = 4
D = 32
MODES = [mode.value for mode in AutoresetMode]
Parts = dict[str, Any]
Wrap = Callable[[Any], Any]

embedding = partial(EmbeddingObservation, allow_partial=True)
vector_embedding = partial(VectorEmbeddingObservation, allow_partial=True)
TWINS: dict[str, tuple[Wrap, Wrap]] = {
    "top_k": (lambda e: TopKActions(e, K), lambda e: VectorTopKActions(e, K)),
    "mask_k": (lambda e: ActionMask(e, top_k=K), lambda e: VectorActionMask(e, top_k=K)),
    "mask_p": (lambda e: ActionMask(e, top_p=0.8), lambda e: VectorActionMask(e, top_p=0.8)),
    "embedding": (embedding, vector_embedding),
    "onehot": (OneHotObservation, VectorOneHotObservation),
    "onehot_of_top_k": (
        lambda e: OneHotObservation(TopKActions(e, K)),
        lambda e: VectorOneHotObservation(VectorTopKActions(e, K)),
    ),
    "text": (TextObservation, VectorTextObservation),
    "embedding_of_top_k": (
        lambda e: embedding(TopKActions(e, K)),
        lambda e: vector_embedding(VectorTopKActions(e, K)),
    ),
    "top_k_of_embedding": (
        lambda e: TopKActions(embedding(e), K),
        lambda e: VectorTopKActions(vector_embedding(e), K),
    ),
    "kl_of_top_k": (lambda e: PolicyKL(TopKActions(e, K)), lambda e: VectorPolicyKL(VectorTopKActions(e, K))),
}
READERS = ["top_k", "mask_k", "mask_p", "embedding", "embedding_of_top_k", "top_k_of_embedding"]


def make(parts: Parts, name: str | None = None, **changes: Any) -> Any:
    env = gym.make(ID, **{**parts, **changes})
    return env if name is None else TWINS[name][0](env)


def make_vec(parts: Parts, name: str, mode: str = "SameStep", num_envs: int = N, **changes: Any) -> Any:
    return TWINS[name][1](gym.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **{**parts, **changes}))


@pytest.fixture
def table(parts: Parts) -> Parts:
    """The same with a table as the reference."""
    rng = np.random.default_rng(0)
    model = markov_lm(dirichlet_rows(rng, len(WORDS) + 1, len(WORDS) + 1, 0.3), WORDS)
    return {**parts, "model": model, "reward": "conftest:word_count"}


def forward(env: Any) -> tuple[Tensor, Tensor]:
    """Hidden state (D,) and logits (V,) at the state of row 0, by one plain forward of its tokens."""
    engine = env.unwrapped.engine
    ids = [*engine.current[0].ids, *engine.response_ids(0)]
    with torch.inference_mode():
        out = engine.lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[-1][0, -1], out.logits[0, -1, : engine.lm.vocab_size]


def actions_of(space: gym.Space[Any], rng: np.random.Generator) -> Any:
    """A batch of actions, with an end now and then."""
    if isinstance(space, gym.spaces.Dict):
        return {"token": actions_of(space["token"], rng), "log_prob": -rng.random(len(space["token"].nvec))}
    rows = len(space.nvec)
    size = int(space.nvec[0])
    if size == K:
        return rng.integers(0, K, rows)
    return np.where(rng.random(rows) < 0.15, EOS, rng.integers(2, size, rows))


def walk(env: Any, rng: np.random.Generator, episodes: int) -> Iterator[tuple[Any, dict[str, Any], bool]]:
    """Observation, info and whether it is the end, at every state of some episodes."""
    for episode in range(episodes):
        observation, info = env.reset(seed=None if episode else 0)
        yield observation, info, False
        ended = False
        while not ended:
            observation, _, terminated, truncated, info = env.step(int(rng.integers(env.action_space.n)))
            ended = terminated or truncated
            yield observation, info, ended


# --- conformance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TWINS if name != "kl_of_top_k"])
@pytest.mark.parametrize("reference", ["parts", "table"])
def test_the_checkers_find_nothing_to_say(name: str, reference: str, request: pytest.FixtureRequest) -> None:
    parts = request.getfixturevalue(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")  # it is meant to be
        if "embedding" in name:
            warnings.filterwarnings("ignore", message=".*A Box observation space (minimum|maximum) value is -?infinity")
        env = make(parts, name)
        check_env(env, skip_render_check=True)
        if name != "text":
            sb3_check_env(env)


@pytest.mark.parametrize("name", [name for name in TWINS if name != "kl_of_top_k"])
def test_a_spec_rebuilds_the_wrappers(parts: Parts, name: str) -> None:
    env = make(parts, name)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert (again.action_space, again.observation_space) == (env.action_space, env.observation_space)
    assert data_equivalence(again.reset(seed=4), env.reset(seed=4))
    assert data_equivalence(again.step(1), env.step(1))


@pytest.mark.parametrize("name", TWINS)
def test_a_copy_goes_on_like_the_original(parts: Parts, name: str) -> None:
    env = make(parts, name, min_new_tokens=4)
    env.action_space.seed(0)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(2)]
    env.step(actions[0])
    copy = pickle.loads(pickle.dumps(env))
    found = copy.step(actions[1])
    expected = env.step(actions[1])
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, float):
            assert a == pytest.approx(b, abs=1e-5)
        elif isinstance(b, np.ndarray):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert found[4].keys() == expected[4].keys()


# --- single and vector ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "config"), [*((name, {}) for name in TWINS), ("embedding_of_top_k", {"truncate": True})], ids=str
)
def test_the_vector_form_is_the_single_one_n_times(parts: Parts, name: str, config: Parts, mode: str) -> None:
    one = make_vec(parts, name, mode, **config)
    other = SyncVectorEnv([lambda: make(parts, name, **config)] * N, autoreset_mode=AutoresetMode(mode))
    assert one.observation_space == other.observation_space
    assert one.action_space == other.action_space
    assert data_equivalence(one.reset(seed=0), other.reset(seed=0))
    rng = np.random.default_rng(1)
    ends = 0
    for t in range(30):
        actions = actions_of(one.action_space, rng)
        left = one.step(actions)
        right = other.step(actions)
        for part, a, b in zip(("obs", "reward", "terminated", "truncated", "info"), left, right, strict=True):
            assert data_equivalence(a, b), f"{part} at step {t}: {a} against {b}"
        assert one.observation_space.contains(left[0])
        ended = left[2] | left[3]
        ends += ended.sum()
        if t % 17 == 11:  # rows in the midst of an episode, and an end that resets itself beside them
            ended = ended | (np.arange(N) == t % N)
        if (mode == "Disabled" and ended.any()) or t % 17 == 11:
            options = [{"reset_mask": ended.copy()} | ({"prompt": "a film"} if t % 2 else {}) for _ in range(2)]
            assert data_equivalence(one.reset(options=options[0]), other.reset(options=options[1]))
    assert ends > 8


@pytest.mark.parametrize("name", READERS)
def test_a_table_gives_the_same_in_both_forms(table: Parts, name: str) -> None:
    one = make_vec(table, name)
    other = SyncVectorEnv([lambda: make(table, name)] * N, autoreset_mode=AutoresetMode.SAME_STEP)
    assert data_equivalence(one.reset(seed=0), other.reset(seed=0))
    rng = np.random.default_rng(2)
    for _ in range(20):
        actions = actions_of(one.action_space, rng)
        assert data_equivalence(one.step(actions), other.step(actions))


def test_the_state_returned_by_a_same_step_reset_is_the_new_one(parts: Parts) -> None:
    envs = make_vec(parts, "embedding_of_top_k", truncate=True, max_new_tokens=2)
    envs.reset(seed=0)
    for _ in range(4):
        observations, _, terminated, truncated, infos = envs.step(np.full(N, K - 1))
        engine = envs.unwrapped.engine
        assert infos["_top_k_ids"].all()
        if "final_info" in infos:
            assert not infos["final_info"]["top_k_ids"].any()
            assert (infos["final_info"]["_top_k_ids"] == terminated | truncated).all()
        for row in range(N):
            ids = [*engine.current[row].ids, *engine.response_ids(row)]
            with torch.inference_mode():
                out = engine.lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            np.testing.assert_allclose(observations[row], out.hidden_states[-1][0, -1], rtol=0, atol=1e-5)
            assert infos["top_k_ids"][row, 0] == out.logits[0, -1, :V].argmax()
            if terminated[row]:
                assert (infos["final_obs"][row] == 0).all()
            if truncated[row]:
                assert np.abs(infos["final_obs"][row]).max() > 0.1


# --- TopKActions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["parts", "table"])
@pytest.mark.parametrize("k", [2, K, 20])
def test_actions_are_the_likeliest_tokens_and_the_eos(reference: str, k: int, request: pytest.FixtureRequest) -> None:
    env = TopKActions(make(request.getfixturevalue(reference)), k)
    assert env.action_space == gym.spaces.Discrete(k)
    eos = env.unwrapped.tokenizer.eos_token_id
    rng = np.random.default_rng(0)
    moved = 0
    for _, info, ended in walk(env, rng, 12):
        if ended:
            assert info["top_k_ids"].tolist() == [0] * k
            assert info["cut_off_mass"] == 0
            continue
        probs = forward(env)[1].double().softmax(-1).numpy()
        ids = info["top_k_ids"]
        order = np.argsort(-probs)
        assert ids.dtype == np.int64
        assert len(set(ids.tolist())) == k
        assert (np.diff(probs[ids]) <= 0).all()
        without = eos not in order[:k]
        moved += without
        assert ids.tolist() == ([*order[: k - 1], eos] if without else order[:k].tolist())
        assert (info["cut_off_mass"].shape, info["cut_off_mass"].dtype) == ((), np.float64)
        assert info["cut_off_mass"] + probs[ids].sum() == pytest.approx(1, abs=1e-5)
        assert info["cut_off_mass"] == pytest.approx(np.delete(probs, ids).sum(), rel=1e-4)
    assert moved > 0


def test_rewards_and_ends_are_those_of_the_tokens(parts: Parts) -> None:
    env = make(parts, "top_k")
    plain = make(parts)
    for episode in range(8):
        info = env.reset(seed=episode)[1]
        plain.reset(seed=episode)
        rng = np.random.default_rng(episode)
        ended = False
        while not ended:
            action = int(rng.integers(K))
            token = int(info["top_k_ids"][action])
            found = env.step(action)
            expected = plain.step(token)
            info = found[4]
            extra = {name: value for name, value in info.items() if name in ("top_k_ids", "cut_off_mass")}
            assert data_equivalence([*found[:4], {k: v for k, v in info.items() if k not in extra}], [*expected])
            assert len(extra) == 2
            ended = expected[2]


def test_all_tokens_leave_no_mass_out(parts: Parts) -> None:
    info = TopKActions(make(parts), V).reset(seed=0)[1]
    assert sorted(info["top_k_ids"].tolist()) == list(range(V))
    assert info["cut_off_mass"] == 0


def test_actions_follow_a_state_that_was_restored(parts: Parts) -> None:
    env = make(parts, "top_k")
    env.reset(seed=0)
    state = env.unwrapped.clone_state()
    first = env.step(0)
    env.step(1)
    env.unwrapped.restore_state(state)
    again = env.step(0)
    assert data_equivalence(again[0], first[0])
    assert again[1] == pytest.approx(first[1], abs=1e-5)


def test_a_vocabulary_with_holes_and_several_ends(parts: Parts) -> None:
    """Padded embeddings, an id the tokenizer lacks, and a second EOS: all as in the reference's distribution."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["extra"])
    vocabulary = tokenizer.get_vocab
    tokenizer.get_vocab = lambda: {w: i for w, i in vocabulary().items() if i != 7}  # type: ignore[method-assign]
    model = freeze(gpt2(len(tokenizer) + 3))
    model.generation_config.eos_token_id = [EOS, 9]
    lm = CausalLM(model, tokenizer)
    assert lm.holes == [7]
    assert lm.eos_token_ids == {EOS, 9}
    parts = {**parts, "model": lm, "reward": "conftest:word_count"}
    legal = len(tokenizer) - 1
    ids = TopKActions(make(parts), legal).reset(seed=0)[1]["top_k_ids"]
    assert sorted(ids.tolist()) == [i for i in range(len(tokenizer)) if i != 7]
    with pytest.raises(InvalidArgumentError, match=f"`k` must be an int >= 2 and <= {legal}, got {legal + 1}."):
        TopKActions(make(parts), legal + 1)
    env = TopKActions(make(parts), 2)
    replaced = 0
    mask = ActionMask(make(parts), top_k=1)
    for seed in range(20):
        info = env.reset(seed=seed)[1]
        masked = mask.reset(seed=seed)[1]["action_mask"]
        logits = forward(env)[1].clone()
        logits[7] = -torch.inf
        best = EOS if logits[EOS] > logits[9] else 9
        if not set(logits.topk(2).indices.tolist()) & {EOS, 9}:
            replaced += 1
            assert info["top_k_ids"].tolist() == [int(logits.argmax()), best]
        assert set(np.flatnonzero(masked)) == {int(logits.argmax()), EOS, 9}
    assert replaced > 5
    assert np.flatnonzero(~ActionMask(make(parts), top_p=1.0).reset()[1]["action_mask"]).tolist() == [7]


@pytest.mark.parametrize("action", [-1, K, 1.0, [1], None], ids=repr)
def test_what_is_no_index_is_refused_and_changes_nothing(parts: Parts, action: Any) -> None:
    env = make(parts, "top_k")
    envs = make_vec(parts, "top_k")
    info = env.reset(seed=0)[1]
    envs.reset(seed=0)
    with pytest.raises(InvalidActionError, match=r"`action` must be ints from 0 to 3 of shape \(\), got"):
        env.step(action)
    with pytest.raises(InvalidActionError, match=r"`action` must be ints from 0 to 3 of shape \(3,\), got"):
        envs.step([action] * N)
    env.step(2)
    assert env.unwrapped.engine.response_ids(0) == [info["top_k_ids"][2]]


def test_outside_an_episode_there_is_nothing_to_step(parts: Parts) -> None:
    env = make(parts, "top_k")
    with pytest.raises(ResetNeeded):
        env.step(0)
    with pytest.raises(ResetNeeded):
        make_vec(parts, "top_k").step(np.zeros(N, dtype=int))
    env.reset(seed=0)
    while not env.step(0)[2]:
        pass
    with pytest.raises(ResetNeeded):
        env.step(0)


# --- ActionMask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution", [{"top_k": 1}, {"top_k": 5}, {"top_k": 99}, {"top_p": 0.5}, {"top_p": 1.0}], ids=str
)
@pytest.mark.parametrize("reference", ["parts", "table"])
def test_a_mask_is_the_support_of_the_sampler_and_the_eos(
    distribution: Any, reference: str, request: pytest.FixtureRequest
) -> None:
    env = ActionMask(make(request.getfixturevalue(reference)), **distribution)
    size = env.unwrapped.engine.lm.vocab_size
    assert (env.action_masks() == np.ones(size, dtype=bool)).all()  # before the first reset
    for _, info, ended in walk(env, np.random.default_rng(3), 6):
        mask = env.action_masks()
        assert (mask.dtype, mask.shape) == (np.bool_, (size,))
        if ended:
            assert info["action_mask"].all()
            assert mask.all()
            continue
        kept = Sampler(**distribution).adjust_logits(forward(env)[1][None], 0)[0].isfinite().numpy()
        assert (mask == (kept | env.unwrapped.engine.is_eos)).all()
        assert (info["action_mask"] == mask).all()
        info["action_mask"][:] = False
        assert env.action_masks().any()


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_rows_whose_episode_is_over(parts: Parts, mode: str) -> None:
    envs = make_vec(parts, "mask_k", mode)
    assert envs.action_masks().all()
    envs.reset(seed=0)
    infos = envs.step(np.array([5, EOS, 5]))[4]
    masks = envs.action_masks()
    over = np.array([False, mode != "SameStep", False])
    assert infos["_action_mask"].all()
    assert (masks.all(1) == over).all()
    assert (infos["action_mask"] == masks).all()
    masks[:] = False
    assert envs.action_masks().any()


def test_maskable_ppo_takes_no_masked_action(parts: Parts) -> None:
    maskable = pytest.importorskip("sb3_contrib").MaskablePPO
    taken: list[bool] = []

    class Checked(ActionMask):
        def step(self, action: Any) -> Any:
            taken.append(bool(self.action_masks()[action]))
            return super().step(action)

    agent = maskable("MultiInputPolicy", Checked(make(parts), top_k=K), n_steps=64, batch_size=32, n_epochs=1, seed=0)
    agent.learn(64)
    assert len(taken) == 64
    assert all(taken)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ({}, "Exactly one of `top_p` and `top_k` must be given, got top_p=None and top_k=None."),
        ({"top_p": 0.5, "top_k": 3}, "Exactly one of `top_p` and `top_k` must be given, got top_p=0.5 and top_k=3."),
        ({"top_k": 0}, "`top_k` must be an int >= 1, got 0."),
        ({"top_p": 0.0}, "`top_p` must be a finite number > 0 and <= 1, got 0.0."),
    ],
    ids=str,
)
def test_distributions_that_cannot_be_are_refused(parts: Parts, distribution: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ActionMask(make(parts), **distribution)
    with pytest.raises(InvalidArgumentError, match=message):
        VectorActionMask(gym.make_vec(ID, **parts), **distribution)


# --- EmbeddingObservation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["parts", "table"])
@pytest.mark.parametrize("name", ["embedding", "embedding_of_top_k", "top_k_of_embedding"])
@pytest.mark.parametrize("truncate", [False, True])
def test_an_embedding_is_the_hidden_state_of_a_plain_forward(
    reference: str, name: str, truncate: bool, request: pytest.FixtureRequest
) -> None:
    env = make(request.getfixturevalue(reference), name, truncate=truncate, max_new_tokens=4)
    width = D if reference == "parts" else len(WORDS) + 1
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
    seen = set()
    for observation, info, ended in walk(env, np.random.default_rng(4), 20):
        assert env.observation_space.contains(observation)
        truncated = truncate and ended and info["finish_reason"] == "length"
        seen.add((ended, truncated))
        expected = np.zeros(width) if ended and not truncated else forward(env)[0].numpy()
        np.testing.assert_allclose(observation, expected, rtol=0, atol=1e-5)
    assert ((True, True) in seen) == truncate


def test_a_model_without_a_ring_cache(parts: Parts) -> None:
    """The plain decoder keeps hidden states anyway."""
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=V, intermediate_size=48, sliding_window=4, initializer_range=0.3, **sizes)
    parts = {**parts, "model": tiny_lm(config), "reward": "conftest:word_count", "max_new_tokens": 4}
    with pytest.warns(UserWarning, match="cannot be decoded with the ring cache"):
        env = make(parts, "embedding_of_top_k")
    for observation, _, ended in walk(env, np.random.default_rng(5), 2):
        if not ended:
            np.testing.assert_allclose(observation, forward(env)[0].numpy(), rtol=0, atol=1e-5)


def test_observations_are_copies(parts: Parts) -> None:
    for env, action in ((make(parts, "embedding"), 5), (make_vec(parts, "embedding"), np.full(N, 5))):
        first = env.reset(seed=0)[0]
        before = first.copy()
        env.step(action)[0][:] = 7
        assert (first == before).all()
        assert not (env.step(action)[0] == 7).any()


def test_an_env_can_be_wrapped_in_the_midst_of_an_episode(parts: Parts) -> None:
    """From the next step on, with the rewards it would have paid anyway."""
    plain = make(parts)
    env = make(parts)
    for e in (plain, env):
        e.reset(seed=0)
        e.step(5)
    env = EmbeddingObservation(env)
    for token in (6, 7):
        observation, reward, *_ = env.step(token)
        np.testing.assert_allclose(observation, forward(env)[0].numpy(), rtol=0, atol=1e-5)
        assert reward == pytest.approx(plain.step(token)[1], abs=1e-5)
    envs = gym.make_vec(ID, num_envs=N, **parts)
    envs.reset(seed=0)
    envs.step(np.array([5, EOS, 6]))
    wrapped = VectorTopKActions(VectorEmbeddingObservation(envs), K)
    observations, _, _, _, infos = wrapped.step(np.zeros(N, dtype=int))
    np.testing.assert_allclose(observations[0], forward(wrapped)[0].numpy(), rtol=0, atol=1e-5)
    assert envs.engine.lengths.tolist() == [2, 0, 2]
    assert infos["top_k_ids"][0, 0] == forward(wrapped)[1].argmax()


# --- TextObservation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"kl_coef": 0.0}, {"dense_kl": False}], ids=str)
def test_a_text_is_prompt_and_response(parts: Parts, config: Parts) -> None:
    env = TextObservation(make(parts, **config))
    observation, _ = env.reset(options={"prompt": "a book", "response_ids": [5]})
    assert observation == f"a book {WORDS[2]}"
    assert env.observation_space.contains(observation)
    observation, *_, info = env.step(EOS)
    assert observation == f"a book {WORDS[2]}" == info["prompt"] + info["response"]


def test_a_bandits_text_is_the_whole_response(parts: Parts) -> None:
    env = TextObservation(gym.make("lmgym/RLHFBandit-v0", **parts))
    assert env.reset(options={"prompt": "a book"})[0] == "a book"
    assert env.step([5, 6, EOS, 7, 7, 7, 7, 7])[0] == f"a book {WORDS[2]} {WORDS[3]}"


def test_the_space_holds_every_text_of_a_tokenizer_of_bytes(parts: Parts) -> None:
    """Bytes make characters that no token has alone: those of no prompt are replaced, and the text keeps its length."""
    lm = CausalLM(freeze(gpt2(257)), byte_tokenizer())
    parts = {**parts, "model": lm, "reward": "conftest:word_count", "prompts": ["caf\u00e9 \u6c34", "x"]}
    env = TextObservation(make(parts))
    space = env.observation_space
    rng = np.random.default_rng(6)
    assert isinstance(space, gym.spaces.Text)
    assert env.reset(options={"prompt": "x\u00fcx"})[0] == "x\ufffdx"
    for observation, _, _ in walk(env, rng, 20):
        assert space.contains(observation)
    assert len(space.character_set) < 260


# --- the price of looking ------------------------------------------------------------------------------------------


@pytest.fixture
def counted(parts: Parts) -> tuple[Parts, list[int]]:
    """Parts over a model of their own whose forwards are counted by a hook, with which it runs as it is."""
    lm = CausalLM(freeze(gpt2(V)), word_tokenizer())
    calls: list[int] = []
    lm.model.transformer.register_forward_pre_hook(lambda module, args: calls.append(1))
    return {**parts, "model": lm, "reward": "conftest:word_count"}, calls


def all_around(env: Any, vector: bool) -> Any:
    """Every wrapper at once; the actions remain tokens."""
    for name in ("mask_k", "mask_p", "embedding", "text", "embedding"):
        env = TWINS[name][vector](env)
    return env


def test_an_episode_costs_no_forward_more(counted: tuple[Parts, list[int]]) -> None:
    parts, calls = counted
    tokens = [5, 6, 7, 8, 9, 10, 11, 12]
    costs = []
    for env in (make(parts), all_around(make(parts), False), make(parts, "embedding_of_top_k")):
        env.reset(seed=0)
        calls.clear()
        for _ in range(3):
            env.reset()
            for token in tokens:
                env.step(token if env.action_space.n == V else list(top_k(env)).index(top_k(env)[0]))
                if not env.unwrapped.engine.running[0]:
                    break
            if env.has_wrapper_attr("action_masks"):
                env.get_wrapper_attr("action_masks")()
        costs.append((len(calls), env.unwrapped.engine.lengths[0]))
    assert costs[0] == costs[1] == (3 * T, T)  # the prompt and all tokens but the last
    assert costs[2][0] <= 3 * T


def top_k(env: Any) -> list[int]:
    ids: list[int] = env.unwrapped.engine.reference_logits()[0].topk(K).indices.tolist()
    return ids


@pytest.mark.parametrize("mode", MODES)
def test_vector_envs_cost_no_forward_more(counted: tuple[Parts, list[int]], mode: str) -> None:
    parts, calls = counted
    costs = []
    for wrap in (lambda e: e, lambda e: all_around(e, True)):
        envs = wrap(gym.make_vec(ID, num_envs=N, autoreset_mode=mode, **parts))
        envs.reset(seed=0)
        envs.step(np.full(N, 5))
        calls.clear()
        rng = np.random.default_rng(7)
        for _ in range(40):
            _, _, terminated, truncated, _ = envs.step(actions_of(envs.action_space, rng))
            ended = terminated | truncated
            if mode == "Disabled" and ended.any():
                envs.reset(options={"reset_mask": ended})
        envs.step(actions_of(envs.action_space, rng))  # pays for what the last look was given in advance
        costs.append(len(calls))
    assert 0 <= costs[1] - costs[0] <= 1  # the look after the last step
    assert costs[0] > 40


def test_only_a_truncated_end_costs_one(counted: tuple[Parts, list[int]]) -> None:
    parts, calls = counted
    for truncate, more in ((False, 0), (True, 1)):
        env = make(parts, "embedding", truncate=truncate, max_new_tokens=3)
        for tokens, forwards in (([5, 6, 7], 3 + more), ([5, EOS], 2)):
            calls.clear()
            env.reset(seed=0)
            for token in tokens:
                env.step(token)
            assert len(calls) == forwards


def test_without_the_wrapper_nothing_is_kept(parts: Parts) -> None:
    env = make(parts, truncate=True, max_new_tokens=2)
    env.reset(seed=0)
    env.step(5), env.step(5)
    engine = env.unwrapped.engine
    assert engine.final_hidden is None
    assert engine._reader._decoder.hidden is None


# --- errors, and other wrappers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("config", [{"kl_coef": 0.0}, {"dense_kl": False}], ids=str)
def test_a_reference_that_never_runs_is_an_error_at_once(parts: Parts, name: str, config: Parts) -> None:
    for build in (make, make_vec):
        with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0 and `dense_kl` True"):
            build(parts, name, **config)


@pytest.mark.parametrize("name", READERS)
def test_other_envs_are_refused(parts: Parts, name: str) -> None:
    single, vector = TWINS[name]
    with pytest.raises(InvalidArgumentError, match="`env` must take one token a step, got one with the actions Multi"):
        single(gym.make("lmgym/RLHFBandit-v0", **parts))
    with pytest.raises(InvalidArgumentError, match="`env` must take one token a step, got one with the actions Multi"):
        vector(gym.make_vec("lmgym/RLHFBandit-v0", **parts))
    with pytest.raises(InvalidArgumentError, match="`env` must be an environment of lmgym, got .*CartPole"):
        single(gym.make("CartPole-v1"))
    with pytest.raises(InvalidArgumentError, match="`env` must be an environment of lmgym, got SyncVectorEnv"):
        vector(SyncVectorEnv([lambda: make(parts)]))


def test_actions_that_are_no_tokens_any_more_are_refused(parts: Parts) -> None:
    for wrap in (TWINS["top_k"], TWINS["mask_k"]):
        for inner in ("top_k", "kl_of_top_k"):
            with pytest.raises(InvalidArgumentError, match=r"`env` must have the actions Discrete\(\d+\), one a token"):
                wrap[0](make(parts, inner))
            with pytest.raises(InvalidArgumentError, match=r"`env` must have the actions Discrete\(\d+\), one a token"):
                wrap[1](make_vec(parts, inner))


@pytest.mark.parametrize("k", [0, 1, V + 1, 2.0, True])
def test_a_k_that_cannot_be_is_refused(parts: Parts, k: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`k` must be an int >= 2 and <= {V}, got {k}."):
        TopKActions(make(parts), k)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_those_of_the_bare_env(parts: Parts, mode: str) -> None:
    if mode == "SameStep" and not COUNTS_SAME_STEP:
        pytest.skip("this Gymnasium counts such episodes wrong")
    envs = VectorRecordEpisodeStatistics(make_vec(parts, "embedding_of_top_k", mode))
    envs.reset(seed=0)
    rng = np.random.default_rng(8)
    seen = 0
    for _ in range(30):
        _, _, terminated, truncated, infos = envs.step(actions_of(envs.action_space, rng))
        ended = terminated | truncated
        if ended.any():
            seen += ended.sum()
            final = infos["final_info"] if mode == "SameStep" else infos
            # At gamma = 1 the discounted return is the return.
            np.testing.assert_allclose(infos["episode"]["r"][ended], final["discounted_return"][ended], rtol=1e-4)
            if mode == "Disabled":
                envs.reset(options={"reset_mask": ended})
    assert seen > 5
    env = RecordEpisodeStatistics(make(parts, "top_k_of_embedding"))
    for _, info, ended in walk(env, rng, 3):
        assert ("episode" in info) == ended
