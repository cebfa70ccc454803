"""N envs in one: the same as N single ones in every mode, and the whole-episode pass the same as stepping."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import COUNTS_SAME_STEP, WORDS, word_count
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import ClipReward, NormalizeReward, RecordEpisodeStatistics, TransformReward

from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidActionError, InvalidArgumentError, LmGymError

ID = "lmgym/RLHF-v0"
EOS = 1
V = len(WORDS) + 3
P = 6
T = 8
N = 4
MODES = [mode.value for mode in AutoresetMode]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"dense_kl": False},
    {"truncate": True},
    {"gamma": 0.9, "missing_eos_penalty": 1.0, "min_new_tokens": 2},
    {"kl_coef": 0.0},
    {"obs_format": "flat"},
    {"group_size": 2, "kl_coef": 0.1, "reward": "conftest:word_count"},
]
Parts = dict[str, Any]


def native(parts: Parts, num_envs: int = N, **changes: Any) -> RLHFVectorEnv:
    envs = gym.make_vec(ID, num_envs=num_envs, **{**parts, **changes})
    assert isinstance(envs, RLHFVectorEnv)
    return envs


def sync(parts: Parts, num_envs: int = N, mode: str = "SameStep", **changes: Any) -> SyncVectorEnv:
    changes.pop("group_size", None)
    make: Callable[[], gym.Env[Any, Any]] = lambda: gym.make(ID, **{**parts, **changes})  # noqa: E731
    return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode(mode))


def random_tokens(rng: np.random.Generator, *shape: int, eos: float = 0.12) -> np.ndarray:
    tokens = rng.integers(2, V, shape)
    tokens[rng.random(shape) < eos] = EOS
    return tokens


# --- the same as N single envs ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_output_is_that_of_single_envs(parts: Parts, config: Parts, mode: str) -> None:
    group = config.get("group_size", 1)
    rows = 2 * group
    one = native(parts, rows, autoreset_mode=mode, **config)
    other = sync(parts, rows, mode=mode, **config)
    assert one.observation_space == other.observation_space
    assert one.action_space == other.action_space
    assert one.metadata["autoreset_mode"] == other.metadata["autoreset_mode"]
    seeds = [7 + row - row % group for row in range(rows)]  # rows of a group draw the same prompts
    assert data_equivalence(one.reset(seed=seeds), other.reset(seed=seeds))
    rng = np.random.default_rng(0)
    ends = 0
    for t in range(40):
        tokens = random_tokens(rng, rows)
        left = one.step(tokens)
        right = other.step(tokens)
        for name, a, b in zip(("obs", "reward", "terminated", "truncated", "info"), left, right, strict=True):
            assert data_equivalence(a, b), f"{name} at step {t}: {a} against {b}"
        ended = left[2] | left[3]
        ends += ended.sum()
        if mode == "Disabled" and ended.any():
            options = {"reset_mask": ended}
            assert data_equivalence(one.reset(options=dict(options)), other.reset(options=dict(options)))
    assert ends > 4 * rows


def test_an_int_seeds_the_rows_one_after_the_other(parts: Parts) -> None:
    one = native(parts)
    other = sync(parts)
    assert data_equivalence(one.reset(seed=3), other.reset(seed=3))
    assert data_equivalence(one.reset(seed=3), one.reset(seed=[3, 4, 5, 6]))
    again = one.reset(seed=[3, None, 5, None])[0]
    assert data_equivalence(again["input_ids"][[0, 2]], one.reset(seed=3)[0]["input_ids"][[0, 2]])
    with pytest.raises(InvalidArgumentError, match="`seed` must be an int or 4 seeds, got 2 of them."):
        one.reset(seed=[1, 2])


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_mask_restarts_its_rows_and_no_other(parts: Parts, mode: str) -> None:
    one = native(parts, autoreset_mode=mode)
    other = sync(parts, mode=mode)
    one.reset(seed=0), other.reset(seed=0)
    tokens = np.full(N, 5)
    one.step(tokens), other.step(tokens)
    mask = np.array([False, True, False, True])
    options = {"reset_mask": mask}
    left = one.reset(options=options)
    assert options == {"reset_mask": mask}  # what the caller passed stays as it was
    assert data_equivalence(left, other.reset(options={"reset_mask": mask}))
    assert left[0]["attention_mask"][:, P:].sum(1).tolist() == [1, 0, 1, 0]
    for _ in range(T - 1):
        left = one.step(tokens)
        right = other.step(tokens)
        assert data_equivalence(left, right)
    assert left[2].tolist() == [True, False, True, False]
    seeded = one.reset(seed=9, options={"reset_mask": mask})[0]["input_ids"]
    assert (seeded[[1, 3]] == native(parts).reset(seed=9)[0]["input_ids"][[1, 3]]).all()


@pytest.mark.parametrize("mask", [[True] * N, np.ones(N), np.ones(N + 1, dtype=bool), np.zeros(N, dtype=bool), 3])
def test_a_bad_reset_mask_is_refused(parts: Parts, mask: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`options\['reset_mask'\]` must be a bool array of shape \(4,\)"):
        native(parts).reset(options={"reset_mask": mask})


def test_options_hold_for_every_row(parts: Parts) -> None:
    envs = native(parts)
    observation, _ = envs.reset(options={"prompt": "a film", "response_ids": [5, 6]})
    assert (observation["input_ids"] == observation["input_ids"][0]).all()
    rewards = envs.step(np.full(N, EOS))[1]
    single = gym.make(ID, **parts)
    single.reset(options={"prompt": "a film", "response_ids": [5, 6]})
    np.testing.assert_allclose(rewards, [single.step(EOS)[1]] * N, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"dense_kl": False}, {"prompt_order": "sequential"}], ids=str)
def test_a_row_does_not_feel_how_many_there_are(parts: Parts, config: Parts) -> None:
    """Rows 0 and 1 of five are rows 0 and 1 of two."""
    rng = np.random.default_rng(1)
    tokens = random_tokens(rng, 60, 5)
    config = {**config, "autoreset_mode": "SameStep"}
    if config.get("prompt_order") == "sequential":  # which prompts a row is dealt does depend on N
        config["prompts"] = ["a film"]
    few = native(parts, 2, **config)
    many = native(parts, 5, **config)
    assert data_equivalence(few.reset(seed=0)[0]["input_ids"], many.reset(seed=0)[0]["input_ids"][:2])
    for row in tokens:
        left = few.step(row[:2])
        right = many.step(row)
        assert (left[0]["input_ids"] == right[0]["input_ids"][:2]).all()
        np.testing.assert_allclose(left[1], right[1][:2], rtol=0, atol=1e-5)
        assert (left[2] == right[2][:2]).all()


def test_two_vector_envs_do_not_disturb_each_other(parts: Parts) -> None:
    tokens = random_tokens(np.random.default_rng(2), 30, N)
    alone = native(parts)
    expected = [alone.reset(seed=1), *(alone.step(row) for row in tokens)]
    one = native(parts)
    other = native(parts)
    other.reset(seed=5)
    found = [one.reset(seed=1)]
    for row in tokens:
        other.step(row[::-1])
        found.append(one.step(row))
    assert data_equivalence(found, expected)


# --- prompts ----------------------------------------------------------------------


def prompts_of(observation: dict[str, Any]) -> list[tuple[int, ...]]:
    ids = observation["input_ids"][:, :P]
    mask = observation["attention_mask"][:, :P] == 1
    return [tuple(row[m].tolist()) for row, m in zip(ids, mask, strict=True)]


def test_sequential_order_deals_the_prompts_out(parts: Parts) -> None:
    single = gym.make(ID, **parts)
    texts = [
        prompts_of({k: v[None] for k, v in single.reset(options={"prompt_index": i})[0].items()})[0] for i in range(6)
    ]
    for group, expected in ((1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (4, [0, 0, 0, 0])):
        envs = native(parts, prompt_order="sequential", group_size=group)
        position = np.array(expected)
        for _ in range(5):
            observation, _ = envs.reset()
            assert prompts_of(observation) == [texts[i % 6] for i in position]
            position = position + N // group
        assert prompts_of(envs.reset(seed=0)[0]) == [texts[i] for i in expected]


@pytest.mark.slow
def test_rows_of_a_group_draw_the_same_prompts_each_at_its_own_pace(parts: Parts) -> None:
    envs = native(parts, 6, group_size=3, autoreset_mode="SameStep")
    for seed in (None, 4):
        seen: list[list[tuple[int, ...]]] = [[p] for p in prompts_of(envs.reset(seed=seed)[0])]
        rng = np.random.default_rng(0)
        for _ in range(100):
            observation, _, ended, _, _ = envs.step(random_tokens(rng, 6, eos=0.2))
            for row in np.flatnonzero(ended):
                seen[row].append(prompts_of(observation)[row])
        for first in (0, 3):
            shortest = min(len(seen[row]) for row in range(first, first + 3))
            assert shortest > 7
            assert len({tuple(seen[row][:shortest]) for row in range(first, first + 3)}) == 1
        assert seen[0][:7] != seen[3][:7]


def test_next_prompts_are_those_that_resets_would_start_from(parts: Parts) -> None:
    for config in ({}, {"group_size": 2}, {"prompt_order": "sequential"}):
        one = native(parts, **config)
        other = native(parts, **config)
        one.reset(seed=2), other.reset(seed=2)
        taken = [list(prompt.ids) for prompt in one.next_prompts(3 * N)]
        dealt = [list(ids) for _ in range(3) for ids in prompts_of(other.reset()[0])]
        assert taken == dealt
        assert data_equivalence(one.reset(), other.reset())


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_the_stream_of_prompts_can_be_put_back(parts: Parts, order: str) -> None:
    envs = native(parts, prompt_order=order)
    envs.reset(seed=3)
    envs.next_prompts(3)  # rows stand at different places
    state = json.loads(json.dumps(envs.get_state()))
    expected = [prompt.index for prompt in envs.next_prompts(40)]
    other = native(parts, prompt_order=order)
    other.reset(seed=77)
    for target in (envs, other):
        target.set_state(state)
        assert [prompt.index for prompt in target.next_prompts(40)] == expected
    assert json.loads(json.dumps(state)) == state
    with pytest.raises(InvalidArgumentError, match="`state` must be that of 4 rows, got 3."):
        envs.set_state({"prompts": state["prompts"][:3]})


def test_streams_that_were_taken_stay_where_they_were(parts: Parts) -> None:
    envs = native(parts, prompt_order="shuffle")
    envs.reset(seed=3)
    taken = envs.streams()
    as_json = json.dumps(envs.get_state())
    expected = [prompt.index for prompt in envs.next_prompts(40)]
    assert json.dumps(taken, default=np.ndarray.tolist) == as_json
    envs.set_state(taken)
    assert [prompt.index for prompt in envs.next_prompts(40)] == expected


# --- the skin ----------------------------------------------------------------------


@pytest.mark.slow
def test_third_party_wrappers_work(parts: Parts) -> None:
    parts["reward"] = word_count
    for mode in MODES:
        tokens = random_tokens(np.random.default_rng(3), 40, N)
        plain = native(parts, autoreset_mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recorded = RecordEpisodeStatistics(native(parts, autoreset_mode=mode))
            others = [
                ClipReward(native(parts, autoreset_mode=mode), -0.5, 0.5),
                TransformReward(native(parts, autoreset_mode=mode), lambda r: 2 * r + 1),
                NormalizeReward(native(parts, autoreset_mode=mode)),
            ]
        for envs in (plain, recorded, *others):
            envs.reset(seed=0)
        lengths = np.zeros(N, dtype=int)
        returns = np.zeros(N)
        seen = 0
        resetting = np.zeros(N, dtype=bool)
        for row in tokens:
            _, rewards, terminated, truncated, _ = plain.step(row)
            infos = recorded.step(row)[4]
            clipped, transformed, normalised = (envs.step(row)[1] for envs in others)
            np.testing.assert_allclose(clipped, rewards.clip(-0.5, 0.5))
            np.testing.assert_allclose(transformed, 2 * rewards + 1)
            assert np.isfinite(normalised).all()
            lengths = np.where(resetting, 0, lengths + 1)
            returns = np.where(resetting, 0.0, returns + rewards)
            ended = terminated | truncated
            seen += ended.sum()
            if ended.any() and (mode != "SameStep" or COUNTS_SAME_STEP):
                assert (infos["_episode"] == ended).all()
                assert (infos["episode"]["l"][ended] == lengths[ended]).all()
                np.testing.assert_allclose(infos["episode"]["r"][ended], returns[ended], rtol=1e-5)
            resetting = ended if mode == "NextStep" else np.zeros(N, dtype=bool)
            if mode != "NextStep":
                lengths = np.where(ended, 0, lengths)
                returns = np.where(ended, 0.0, returns)
            if mode == "Disabled" and ended.any():
                for envs in (plain, recorded, *others):
                    envs.reset(options={"reset_mask": ended.copy()})
        assert seen > 12


@pytest.mark.parametrize("mode", MODES)
def test_a_spec_survives_json(parts: Parts, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = native(parts, autoreset_mode=mode, group_size=2)
        assert envs.spec is not None
        again = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    assert again.num_envs == N
    assert again.metadata == envs.metadata
    assert data_equivalence(again.reset(seed=1), envs.reset(seed=1))


def test_attributes_and_methods_come_once_a_row(parts: Parts) -> None:
    envs = native(parts)
    assert envs.get_attr("kl_coef") == (0.2,) * N
    assert envs.call("kl_coef") == (0.2,) * N
    assert [task.name for task in envs.get_attr("task")] == ["reviews"] * N
    assert envs.call("next_prompts", 2)[0][0].index >= 0
    envs.set_attr("note", 3)
    assert envs.get_attr("note") == (3,) * N
    envs.set_attr("note", [4] * N)
    assert envs.note == 4
    with pytest.raises(InvalidArgumentError, match=r"`values` must be one value or 4 equal ones, got \[1, 2, 3, 4\]."):
        envs.set_attr("note", [1, 2, 3, 4])
    with pytest.raises(AttributeError):
        envs.get_attr("no_such_attribute")


@pytest.mark.parametrize("mode", MODES)
def test_rendering_is_that_of_single_envs(parts: Parts, mode: str) -> None:
    pytest.importorskip("PIL")
    one = native(parts, render_mode="ansi", autoreset_mode=mode)
    other = sync(parts, mode=mode, render_mode="ansi")
    with pytest.raises(ResetNeeded):
        one.render()
    one.reset(seed=0), other.reset(seed=0)
    assert one.render() == other.render()
    for row in ([5, 6, EOS, 7], [8, EOS, 9, 10]):
        tokens = np.array(row)
        ended = one.step(tokens)[2]
        other.step(tokens)
        assert one.render() == other.render()
        if mode == "Disabled":
            one.reset(options={"reset_mask": ended})
            other.reset(options={"reset_mask": ended})
    pictures = native(parts, 2, render_mode="rgb_array")
    pictures.reset(seed=0)
    found = pictures.render()
    assert len(found) == 2
    assert found[0].dtype == np.uint8
    assert found[0].shape == found[1].shape


def test_rendering_without_a_mode_warns(parts: Parts) -> None:
    envs = native(parts)
    envs.reset()
    with pytest.warns(UserWarning, match="render_mode='ansi'"):
        assert envs.render() is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_envs": 0}, "`num_envs` must be an int >= 1, got 0."),
        ({"group_size": 0}, "`group_size` must be an int >= 1, got 0."),
        ({"group_size": 3}, "`group_size` must divide `num_envs`=4, got 3."),
        ({"autoreset_mode": "Samestep"}, r"got 'Samestep'. Did you mean 'SameStep'\?"),
        ({"render_mode": "human"}, r"`render_mode` must be one of \['ansi', 'rgb_array'\], got 'human'."),
        ({"gruop_size": 2}, "got 'gruop_size'."),
    ],
)
def test_bad_arguments(parts: Parts, bad: Parts, message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        RLHFVectorEnv(**{"num_envs": N, **parts, **bad})


def test_the_mode_may_be_the_enum(parts: Parts) -> None:
    envs = RLHFVectorEnv(2, autoreset_mode=AutoresetMode.SAME_STEP, **parts)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def test_steps_outside_an_episode_are_refused(parts: Parts) -> None:
    envs = native(parts, autoreset_mode="Disabled")
    tokens = np.full(N, 5)
    with pytest.raises(ResetNeeded):
        envs.step(tokens)
    envs.reset(seed=0)
    envs.step(np.array([5, EOS, 5, 5]))
    with pytest.raises(ResetNeeded):
        envs.step(tokens)
    envs.reset(options={"reset_mask": np.array([False, True, False, False])})
    envs.step(tokens)


@pytest.mark.parametrize(
    "actions", [np.array([5, V, 5, 5]), np.array([5, 5, 5, -1]), np.full(N, 5.0), np.full(3, 5), 5, np.full((N, 1), 5)]
)
def test_what_are_no_tokens_is_refused_and_changes_nothing(parts: Parts, actions: Any) -> None:
    envs = native(parts)
    other = native(parts)
    envs.reset(seed=0), other.reset(seed=0)
    with pytest.raises(InvalidActionError, match="`action` must be "):
        envs.step(actions)
    good = torch.tensor([5, 6, 7, 8])
    assert data_equivalence(envs.step(good), other.step(good.tolist()))


def test_the_action_of_a_row_that_is_being_reset_does_not_matter(parts: Parts) -> None:
    envs = native(parts)
    envs.reset(seed=0)
    envs.step(np.array([5, EOS, 5, 5]))
    _, rewards, terminated, _, infos = envs.step(np.array([5, -7, 5, 5]))
    assert rewards[1] == 0
    assert not terminated[1]
    assert infos["ref_log_prob"][1] == 0


# --- the whole-episode pass ----------------------------------------------------------------------


REPLAYED = [*CONFIGS, {"dense_kl": False, "gamma": 0.7, "truncate": True}, {"missing_eos_penalty": 2.0}]


def stepped(envs: RLHFVectorEnv, responses: np.ndarray) -> dict[str, Any]:
    """What the first episode of every row gives, token by token."""
    rows = len(responses)
    found: dict[str, Any] = {name: np.zeros(responses.shape) for name in ("rewards", "ref_log_probs")}
    found |= {"mask": np.zeros(responses.shape, dtype=bool), "info": [{}] * rows, "ends": [None] * rows}
    running = np.ones(rows, dtype=bool)
    for t in range(T):
        _, rewards, terminated, truncated, infos = envs.step(responses[:, t])
        final = infos.get("final_info", {})
        ended = (terminated | truncated) & running
        found["mask"][running, t] = True
        found["rewards"][running, t] = rewards[running]
        for source in (infos, final):
            paid = running & source.get("_ref_log_prob", np.zeros(rows, dtype=bool))
            found["ref_log_probs"][paid, t] = source["ref_log_prob"][paid] if paid.any() else 0
        for row in np.flatnonzero(ended):
            found["info"][row] = {name: final[name][row] for name in final if not name.startswith("_")}
            found["ends"][row] = (bool(terminated[row]), bool(truncated[row]))
        running &= ~ended
    assert not running.any()
    return found


def responses_of(rng: np.random.Generator, rows: int) -> np.ndarray:
    responses = random_tokens(rng, rows, T)
    responses[0] = 5
    responses[1, 0] = EOS
    responses[2, -1] = EOS
    responses[2, :-1] = 6
    return responses


@pytest.mark.parametrize("config", REPLAYED, ids=str)
def test_one_pass_gives_what_stepping_gives(parts: Parts, config: Parts) -> None:
    envs = native(parts, 6, prompt_order="sequential", autoreset_mode="SameStep", **config)
    groups = 6 // config.get("group_size", 1)
    rng = np.random.default_rng(5)
    for _ in range(3):
        prompts = [envs.engine.prompts[row * groups // 6] for row in range(6)]
        responses = responses_of(rng, 6)
        envs.reset(seed=0)
        slow = stepped(envs, responses)
        fast = envs.replay(prompts, responses)
        assert (fast.response_mask == slow["mask"]).all()
        np.testing.assert_allclose(fast.rewards, slow["rewards"], rtol=0, atol=1e-5)
        if config.get("dense_kl", True):
            np.testing.assert_allclose(fast.ref_log_probs, slow["ref_log_probs"], rtol=0, atol=1e-5)
        sums = slow["ref_log_probs"].sum(1)
        np.testing.assert_allclose(fast.ref_log_probs.sum(1), sums, rtol=0, atol=1e-5)
        assert (sums == 0).all() == (config.get("kl_coef") == 0)
        assert list(zip(fast.terminated.tolist(), fast.truncated.tolist(), strict=True)) == slow["ends"]
        assert {"eos", "length"} == set(fast.outcomes.finish_reasons)
        for row, info in enumerate(slow["info"]):
            assert fast.outcomes.scores[row] == pytest.approx(info["score"], abs=1e-5)
            assert fast.outcomes.discounted_returns[row] == pytest.approx(info["discounted_return"], abs=1e-5)
            texts = (fast.outcomes.prompts, fast.outcomes.responses, fast.outcomes.finish_reasons)
            assert [text[row] for text in texts] == [info[k] for k in ("prompt", "response", "finish_reason")]


def test_one_pass_in_bfloat16_within_its_rounding(parts: Parts) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        envs = native(parts, 6, prompt_order="sequential", autoreset_mode="SameStep", dtype=dtype)
        envs.reset(seed=0)
        responses = responses_of(np.random.default_rng(6), 6)
        prompts = [envs.engine.prompts[row] for row in range(6)]
        found.append((stepped(envs, responses), envs.replay(prompts, responses)))
    (slow, fast), (slow_16, fast_16) = found
    rounding = np.abs(slow_16["ref_log_probs"] - slow["ref_log_probs"]).max()
    assert 1e-4 < rounding < 0.3  # what bfloat16 does to a log-prob here
    assert np.abs(fast_16.ref_log_probs - fast.ref_log_probs).max() < 2 * rounding
    assert np.abs(fast_16.ref_log_probs - slow_16["ref_log_probs"]).max() < 2 * rounding
    assert (fast_16.response_mask == fast.response_mask).all()
    assert fast_16.outcomes.scores == fast.outcomes.scores  # scored in float32


def test_one_pass_touches_no_row_and_ignores_what_follows_the_end(parts: Parts) -> None:
    envs = native(parts)
    other = native(parts)
    envs.reset(seed=0), other.reset(seed=0)
    rng = np.random.default_rng(7)
    responses = np.full((5, T), 5)
    responses[:, 2] = EOS
    prompts = [envs.engine.prompts[i] for i in (3, 3, 0, 1, 5)]
    before = envs.replay(prompts, responses)
    responses[:, 3:] = [[-1], [V + 9], [EOS], [7], [0]]  # anything
    after = envs.replay(prompts, responses)
    assert (before.rewards == after.rewards).all()
    assert before.outcomes == after.outcomes
    np.testing.assert_allclose(before.rewards[0], before.rewards[1], rtol=0, atol=1e-6)
    for _ in range(10):
        tokens = random_tokens(rng, N)
        assert data_equivalence(envs.step(tokens), other.step(tokens))


def test_one_pass_refuses_what_are_no_responses(parts: Parts) -> None:
    envs = native(parts)
    prompts = [envs.engine.prompts[0]] * 2
    responses = np.full((2, T), 5)
    with pytest.raises(InvalidArgumentError, match=r"`response_ids` must have shape \(2, 8\), got \(2, 7\)."):
        envs.replay(prompts, responses[:, :-1])
    with pytest.raises(InvalidArgumentError, match=r"`response_ids` must have shape \(1, 8\), got \(2, 8\)."):
        envs.replay(prompts[:1], responses)
    responses[1, 3] = V
    with pytest.raises(InvalidActionError, match=f"`action` must be a token id from 0 to {V - 1}, got {V}."):
        envs.replay(prompts, responses)


def test_the_references_logits_can_be_looked_at(parts: Parts) -> None:
    """Any number of times, without disturbing the steps: they are those that the next step will pay by."""
    envs = native(parts, autoreset_mode="SameStep")
    other = native(parts, autoreset_mode="SameStep")
    observation = envs.reset(seed=0)[0]
    other.reset(seed=0)
    rng = np.random.default_rng(9)
    model = envs.engine.lm.model
    for _ in range(12):
        logits = [envs.engine.reference_logits().clone() for _ in range(2)]
        assert torch.equal(logits[0], logits[1])
        torch.testing.assert_close(torch.from_numpy(envs.reference_log_probs()), logits[0].log_softmax(-1))
        for row in range(N):
            history = observation["input_ids"][row][observation["attention_mask"][row] == 1]
            with torch.inference_mode():
                raw = model(input_ids=torch.tensor(history[None])).logits[0, -1, :V]
            torch.testing.assert_close(logits[0][row], raw, rtol=0, atol=1e-5)
        tokens = random_tokens(rng, N)
        found = envs.step(tokens)
        assert data_equivalence(found, other.step(tokens))
        observation = found[0]
    for config in ({"kl_coef": 0.0}, {"dense_kl": False}):
        with pytest.raises(InvalidArgumentError, match="`kl_coef` must be > 0 and `dense_kl` True"):
            native(parts, **config).engine.reference_logits()


# --- memory ----------------------------------------------------------------------


@pytest.mark.slow
def test_two_thousand_episodes_leave_nothing_in_memory(parts: Parts) -> None:
    envs = native(parts, 16, max_new_tokens=2, autoreset_mode="SameStep", reward=word_count)
    rng = np.random.default_rng(8)
    episodes = 0
    envs.reset(seed=0)

    def play(count: int) -> int:
        played = 0
        while played < count:
            _, _, terminated, _, _ = envs.step(random_tokens(rng, 16, eos=0.4))
            played += terminated.sum()
        gc.collect()
        return played

    def census() -> tuple[int, int]:
        objects = gc.get_objects()
        return len(objects), sum(issubclass(type(x), torch.Tensor) for x in objects)

    play(100)
    before = census()
    episodes = play(2000)
    after = census()
    assert episodes >= 2000
    assert after[0] - before[0] < 500
    assert after[1] - before[1] < 50  # prompts read ahead come and go, a batch at a time
