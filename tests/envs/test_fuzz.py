"""Arguments of any kind: an environment takes them, or says what is wrong with an error of its own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import gpt2, word_count, word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmgym  # noqa: F401
from lmgym.data.prompts import read_prompts
from lmgym.envs.options import RESET_OPTIONS
from lmgym.envs.settings import Settings
from lmgym.errors import InvalidActionError, InvalidArgumentError, LmGymError
from lmgym.feedback.files import read_records
from lmgym.feedback.judgements import KINDS
from lmgym.models.causal import CausalLM, freeze
from lmgym.tasks import Task

EXPECTED = (LmGymError, gym.error.ResetNeeded)
FEW = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**64), 10**400, True, False, np.int64(2), np.uint8(3), np.float32(0.5), 1j]),
    st.floats(),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["34", "the film", "\ud800", "\u202e", "auto", "${x}", "cpu"]))
scalars = st.one_of(st.none(), numbers, texts, st.binary(max_size=3))
arrays = st.sampled_from(
    [
        np.array(3),
        np.array([1, 2]),
        np.array([1.5]),
        np.array(["a"]),
        np.array([[1], [2]]),
        np.array([1, None], dtype=object),
        np.array([2**64 - 1], dtype=np.uint64),
        torch.tensor([1, 2]),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0], requires_grad=True),
        torch.zeros(2, device="meta"),
        object(),
        len,
        range(3),
        {3},
        {3: 4},
        iter([1]),
    ]
)
anything = st.recursive(
    st.one_of(scalars, arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(texts, st.integers(0, 3)), inner, max_size=2),
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def task() -> Task:
    tokenizer = word_tokenizer()
    lm = CausalLM(freeze(gpt2(len(tokenizer))), tokenizer)
    prompts = {"train": ["the film was", "a book"]}
    return Task(name="t", model=lm, reward=word_count, prompts=prompts, kl_coef=0.1, max_new_tokens=3)


@pytest.fixture(scope="module")
def env(task: Task) -> Any:
    return gym.make("lmgym/RLHF-v0", task=task, device="cpu").unwrapped


@pytest.fixture(scope="module")
def envs(task: Task) -> Any:
    return gym.make_vec("lmgym/RLHF-v0", num_envs=2, task=task, device="cpu")


def passes(call: Any, *arguments: Any, **keywords: Any) -> bool:
    """Whether a call goes well; raises what is not an error of ours."""
    try:
        call(*arguments, **keywords)
    except EXPECTED:
        return False
    return True


@FEW
@given(name=st.sampled_from([*vars(Settings()), "no_such_name"]), value=anything)
def test_settings_of_any_kind(task: Task, name: str, value: Any) -> None:
    passes(lambda: Settings.of({"task": task, name: value}).resolve())


@settings(FEW, max_examples=60)
@given(
    name=st.sampled_from([n for n in vars(Settings()) if n not in ("model", "reward", "dtype", "device")]),
    value=anything,
)
def test_envs_of_any_kind(task: Task, name: str, value: Any) -> None:
    from lmgym.envs.single import RLHFEnv

    passes(lambda: RLHFEnv(**{"task": task, "device": "cpu", name: value}))


@FEW
@given(seed=anything)
def test_seeds_of_any_kind(env: Any, envs: Any, seed: Any) -> None:
    passes(env.reset, seed=seed)
    passes(envs.reset, seed=seed)


@pytest.mark.slow
@settings(FEW, max_examples=400)
@given(options=st.one_of(anything, st.dictionaries(st.sampled_from([*RESET_OPTIONS, "reset_mask"]), anything)))
def test_reset_options_of_any_kind(env: Any, envs: Any, options: Any) -> None:
    before = repr(options)
    passes(env.reset, options=options)
    passes(envs.reset, options=options)
    assert repr(options) == before


@FEW
@given(action=anything)
def test_actions_of_any_kind(env: Any, envs: Any, action: Any) -> None:
    env.reset()
    envs.reset()
    if passes(env.step, action):
        assert np.issubdtype(np.asarray(action).dtype, np.integer)
    passes(envs.step, action)


@pytest.mark.parametrize("name", ["prompt_ids", "response_ids"])
@pytest.mark.parametrize(
    "ids",
    [0, [3.7], [4.0], "34", True, [True], {3: 4}, {3}, [math.nan], [math.inf], None, [[3]], np.array([3.0]), [2**70]],
)
def test_token_ids_that_are_none_are_refused(env: Any, name: str, ids: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must"):
        env.reset(options={name: ids})


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6]), torch.tensor([5, 6]), [np.int64(5), 6], range(5, 7)])
def test_token_ids_may_come_in_any_sequence(env: Any, ids: Any) -> None:
    for name in ("prompt_ids", "response_ids"):
        observation, _ = env.reset(options={name: ids})
        assert observation["input_ids"][observation["attention_mask"] == 1].tolist()[-2:] == [5, 6]


@pytest.mark.parametrize("options", [1, "prompt", ["prompt"], np.zeros(2), {3: 4}])
def test_options_that_are_none_are_refused(env: Any, envs: Any, options: Any) -> None:
    for reset in (env.reset, envs.reset):
        with pytest.raises(LmGymError, match="`options` must"):
            reset(options=options)


@pytest.mark.parametrize("seed", [0.0, "0", [0], -1, True, np.array(0), math.nan])
def test_seeds_that_are_none_are_refused(env: Any, envs: Any, seed: Any) -> None:
    for reset in (env.reset, envs.reset):
        with pytest.raises(InvalidArgumentError, match="`seed` must be"):
            reset(seed=seed)


@pytest.mark.parametrize("index", [True, 1.0, "1", None, -1, 2, [1], np.array([1])])
def test_indices_of_prompts_that_are_none_are_refused(env: Any, index: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`prompt_index` must be an int from 0 to 1"):
        env.reset(options={"prompt_index": index})


@pytest.mark.parametrize(
    "action", [[[1], [1, 2]], torch.tensor([1, 2], dtype=torch.bfloat16), torch.zeros(2, device="meta"), "ab", None]
)
def test_actions_that_are_none_are_refused(env: Any, envs: Any, action: Any) -> None:
    for one in (env, envs):
        one.reset()
        with pytest.raises(InvalidActionError, match="`action` must be"):
            one.step(action)


def test_sizes_that_no_machine_has_are_refused(task: Task) -> None:
    from lmgym.tasks import make_task

    with pytest.raises(InvalidArgumentError, match="`max_new_tokens` must be at most 1048576, got 2147483648"):
        make_task(task, max_new_tokens=2**31)
    with pytest.raises(InvalidArgumentError, match="`num_envs` must be at most"):
        gym.make_vec("lmgym/RLHF-v0", num_envs=10**9, task=task, device="cpu")


# --- files

ROWS = [b'{"prompt": "a"}', b'{"prompt": "a", "chosen": " b", "rejected": " c"}', b"a", b"[1]", b"\xff", b""]
lines = st.one_of(st.sampled_from(ROWS), st.binary(max_size=12))
contents = st.one_of(st.binary(max_size=40), st.lists(lines, max_size=4).map(b"\n".join))
endings = st.sampled_from(["txt", "jsonl", "JSON", "csv", "tsv", "jsonl.gz", "txt.GZ", "parquet", "md"])


@FEW
@given(content=contents, ending=endings)
def test_files_of_any_content(tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{ending}"
    path.write_bytes(content)
    passes(read_prompts, path)
    passes(load_records, path)


@FEW
@given(source=anything)
def test_rows_of_any_kind(source: Any) -> None:
    passes(read_prompts, source)
    passes(load_records, source)
    passes(read_prompts, [{"prompt": source, "answer": source}])
    passes(load_records, [{"prompt": "a", "chosen": source, "rejected": source}])
    passes(load_records, [{"prompt": "a", "completion": source, "label": source}])
    passes(load_records, [{"prompt": source, "completions": source, "judgement": source}])
    for kind in KINDS.values():
        judgement = {"kind": kind.kind} | {item.name: source for item in dataclasses.fields(kind)}
        passes(load_records, [{"prompt": "a", "completions": ["b", "c"], "judgement": judgement}])


def load_records(source: Any) -> None:
    list(read_records(source))
