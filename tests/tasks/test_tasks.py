"""Tasks: fields and their replacement, prompts from files, the registry, and validation of everything registered."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from conftest import WORDS, gpt2, local_tasks, word_count, word_tokenizer

import lmgym.tasks
from builders import cards
from lmgym.errors import InvalidArgumentError, LmGymError, RewardError, UnknownNameError
from lmgym.models.causal import CausalLM, freeze
from lmgym.tasks import Task, make_task, register_task, registered_tasks, registry
from lmgym.tasks.base import check_split, read_prompts

TASKS = local_tasks()


def tiny(**changes: Any) -> Task:
    fields = {
        "name": "tiny",
        "model": "org/model",
        "reward": word_count,
        "prompts": {"train": ["a film"], "test": ["it"]},
    }
    return Task(**{**fields, "kl_coef": 0.2, "max_new_tokens": 8, **changes})


@pytest.fixture
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))


# --- everything registered ----------------------------------------------------------------------


def test_the_built_in_task_is_there() -> None:
    assert "reviews" in TASKS


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_valid(name: str) -> None:
    task = make_task(name)
    task.validate()
    assert task.name == name
    assert {"train", "test"} <= set(task.prompts)
    train, test = (set(task.prompts[split]) for split in ("train", "test"))
    assert train == test or not train & test


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_an_env_of_its_own(name: str) -> None:
    env_id = registered_tasks()[name].env_id
    assert env_id in gym.registry
    assert gym.registry[env_id].kwargs == {"task": name}
    env = gym.make(env_id, max_new_tokens=2)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.unwrapped.task.name == name


def test_env_ids_are_made_from_names() -> None:
    assert registry.Registered("short_reviews", 3, tiny).env_id == "lmgym/ShortReviews-v3"


def test_importing_registers_the_envs() -> None:
    assert {"lmgym/RLHF-v0", "lmgym/RLHFBandit-v0", "lmgym/Reviews-v0"} <= set(gym.registry)
    for name in ("lmgym/RLHF-v0", "lmgym/RLHFBandit-v0", "lmgym/Reviews-v0"):
        assert gym.registry[name].max_episode_steps is None  # the horizon is the MDP's own
        assert gym.registry[name].vector_entry_point is not None


# --- the registry ----------------------------------------------------------------------


@pytest.mark.usefixtures("_clean_registry")
def test_a_task_of_ones_own_is_found_by_name(parts: dict[str, Any]) -> None:
    built: list[int] = []

    def build() -> Task:
        built.append(1)
        return tiny(name="mine", model=parts["model"], reward=parts["reward"])

    assert register_task("mine", build) == "lmgym/Mine-v0"
    assert not built  # nothing is built before it is asked for
    assert gym.make("lmgym/Mine-v0").unwrapped.task.name == "mine"
    env = gym.make("lmgym/RLHF-v0", task="mine")
    assert env.unwrapped.task.name == "mine"
    assert gym.make_vec("lmgym/RLHF-v0", num_envs=2, task="mine", split="test").task.name == "mine"
    with pytest.raises(UnknownNameError, match=r"`task` must be one of the .*, got 'mne'. Did you mean 'mine'\?"):
        make_task("mne")


TOY = '''"""Is one word said at once? A toy."""

import numpy as np

from lmgym.automata import phrases
from lmgym.models.tables import markov_lm
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks import Task, register_task


def toy() -> Task:
    """The task."""
    return Task(
        name="toy",
        model=lambda: markov_lm(np.full((1, 3), 1 / 3), ["a", "b"], order=0),
        reward=AutomatonReward(phrases([[1]], 3)),
        prompts={"train": ["a"], "test": ["b"]},
        kl_coef=0.1,
        max_new_tokens=2,
    )


register_task("toy", toy)
'''


@pytest.mark.usefixtures("_clean_registry")
def test_one_file_in_the_folder_of_tasks_is_all_a_task_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(lmgym.tasks, "__path__", [*lmgym.tasks.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_registry", {})  # the page is then quick to write
    try:
        assert list(registered_tasks()) == ["toy"]
        assert [task.name for task in lmgym.suite()] == ["toy"]
        assert gym.make("lmgym/Toy-v0").unwrapped.task.name == "toy"
        assert make_task("toy").optimum("test").exact
        lines = cards.page().splitlines()
        assert lines[lines.index("## toy") + 2] == "Is one word said at once? A toy."
        assert any(line.startswith("| `toy` | `lmgym/Toy-v0` | 2 | 3 |") for line in lines)
    finally:
        del sys.modules["lmgym.tasks.toy"]
        del lmgym.tasks.toy  # type: ignore[attr-defined]


def test_the_registry_is_as_it_was() -> None:
    assert not {"mine", "toy"} & registered_tasks().keys()


@pytest.mark.parametrize("got", [None, 3, ["reviews"]])
def test_what_is_no_task_is_refused(got: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`task` must be a name or a lmgym.tasks.Task, got"):
        make_task(got)


def test_an_unknown_split_is_refused() -> None:
    check_split(tiny(), "test")
    with pytest.raises(UnknownNameError, match=r"`split` must be one of .*, got 'tran'. Did you mean 'train'\?"):
        check_split(tiny(), "tran")


# --- replacement ----------------------------------------------------------------------


def test_nothing_given_nothing_changed() -> None:
    task = tiny(max_prompt_tokens=7)
    assert make_task(task) is task or make_task(task) == task
    unchanged = {f.name: None for f in fields(Task) if f.name != "name"}
    assert make_task(task, **unchanged) == task


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_coef", 0.0),  # falsy values are values
        ("gamma", 0.0),
        ("max_new_tokens", 3),
        ("min_new_tokens", 2),
        ("missing_eos_penalty", 0.5),
        ("dense_kl", False),
        ("truncate", True),
        ("model", "org/other"),
        ("reward", "org/reward"),
    ],
)
def test_each_field_can_be_replaced(name: str, value: Any) -> None:
    task = tiny()
    changed = make_task(task, **{name: value})
    assert getattr(changed, name) == value
    for f in fields(Task):
        if f.name != name:
            assert getattr(changed, f.name) == getattr(task, f.name)
    assert getattr(task, name) != value


def test_new_prompts_are_those_of_every_split() -> None:
    changed = make_task(tiny(), prompts=["we liked", "it"])
    assert dict(changed.prompts) == {"train": ("we liked", "it"), "test": ("we liked", "it")}
    assert dict(make_task(tiny(), prompts={"dev": ["a"]}).prompts) == {"dev": ["a"]}


def test_another_reward_has_no_gold_reward() -> None:
    task = tiny(gold=word_count)
    assert make_task(task, kl_coef=0.1).gold is word_count
    assert make_task(task, reward="org/reward").gold is None
    assert make_task(task, reward="org/reward", gold=word_count).gold is word_count


def test_a_limit_counted_in_the_tasks_own_tokens_goes_with_them() -> None:
    task = tiny(max_prompt_tokens=4)
    assert make_task(task, kl_coef=0.1).max_prompt_tokens == 4
    assert make_task(task, model="org/other").max_prompt_tokens is None
    assert make_task(task, prompts=["a"]).max_prompt_tokens is None
    assert make_task(task, prompts=["a"], max_prompt_tokens=9).max_prompt_tokens == 9


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kl_coef": -1}, "`kl_coef` must be a finite number >= 0, got -1."),
        ({"kl_coef": True}, "`kl_coef` must be a finite number >= 0, got True."),
        ({"gamma": 2}, "`gamma` must be a finite number >= 0 and <= 1, got 2."),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an int >= 1, got 0."),
        ({"min_new_tokens": 8}, "`min_new_tokens` must be an int >= 0 and <= 7, got 8."),
        ({"max_prompt_tokens": 0}, "`max_prompt_tokens` must be an int >= 1, got 0."),
        ({"prompts": {"train": []}}, r"`prompts\['train'\]` must be a non-empty list of texts or rows, got \[\]."),
        ({"prompts": {"train": "a film"}}, r"`prompts\['train'\]` .* there is no file 'a film'."),
        (
            {"prompts": {"train": ["a", None]}},
            "must hold texts or rows with a .prompt., and item 1 is None.",
        ),
        ({"prompts": {}}, r"`prompts` must have at least one split"),
        ({"model": None}, "`model` must be a local directory or a hub name, got None."),
        ({"reward": ":f"}, "`reward` must be an import path 'package.module:function', got ':f'."),
    ],
)
def test_bad_fields_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(LmGymError, match=message):
        tiny(**bad)


# --- prompts from files ----------------------------------------------------------------------


def test_prompts_from_a_list_a_text_file_and_json_lines(tmp_path: Path) -> None:
    texts = ["a film", "wé liked", "  it"]
    plain, lines, strings = (tmp_path / name for name in ("p.txt", "p.jsonl", "q.json"))
    plain.write_text("\n".join([texts[0], "", *texts[1:]]) + "\n\n", encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"prompt": t, "id": 3}) for t in texts) + "\n\n", encoding="utf-8")
    strings.write_text("\n".join(json.dumps(t) for t in texts), encoding="utf-8")
    for source in (texts, tuple(texts), str(plain), plain, str(lines), str(strings)):
        assert read_prompts(source) == tuple(texts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2, is not JSON"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n\n[1]',
            r"texts or rows with a .prompt., and line 4 of '.*' is \[1\].",
        ),
        (
            "p.jsonl",
            '{"promt": "a"}',
            r"rows with a .prompt., and line 1 of .* has the columns \['promt'\].",
        ),
        ("p.jsonl", '{"prompt": 3}', "must hold non-empty texts, and line 1 of .* is 3."),
        ("p.jsonl", '{"prompt": " "}', "`prompts` must hold non-empty texts, and line 1 of '.*p.jsonl' is ' '."),
        ("p.txt", "\n \n", "`prompts` must be a non-empty list of texts or rows, got '.*p.txt'."),
    ],
)
def test_what_is_wrong_in_a_file_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(
            InvalidArgumentError, match="a list of texts or rows, or a file of them, and there is no file"
        ):
            read_prompts(str(path))


# --- validation ----------------------------------------------------------------------


def test_validation_finds_what_only_the_parts_can_tell(parts: dict[str, Any]) -> None:
    whole = {"model": parts["model"], "reward": parts["reward"]}
    tiny(**whole).validate()
    with pytest.raises(InvalidArgumentError, match=r"`prompts\['train'\]` must have 1 to 2 tokens each, and .* has 3."):
        tiny(**whole, prompts={"train": ["a", "a film was"]}, max_prompt_tokens=2).validate()
    with pytest.raises(RewardError, match="returned nan"):
        tiny(model=parts["model"], reward=lambda **_: [float("nan")]).validate()
    with pytest.raises(RewardError, match="must return 1 scores"):
        tiny(**whole, gold=lambda **_: [1.0, 2.0]).validate()


def test_a_model_without_an_end_token_is_fine() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    model = gpt2(len(WORDS) + 3)
    model.generation_config.eos_token_id = None
    lm = CausalLM(freeze(model), tokenizer)
    assert not lm.eos_token_ids
    task = tiny(model=lm)
    task.validate()
    env = gym.make("lmgym/RLHF-v0", task=task)
    env.reset(seed=0)
    steps = [env.step(1) for _ in range(8)]
    assert [s[2] for s in steps] == [False] * 7 + [True]
    assert steps[-1][4]["finish_reason"] == "length"


def test_loading_a_task_loads_no_model_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert make_task("reviews", kl_coef=0.5).kl_coef == 0.5


def test_parts_are_shared(parts: dict[str, Any]) -> None:
    task = tiny(model=parts["model"], reward=parts["reward"])
    assert task.reference() is make_task(task, kl_coef=0.7).reference()
    assert task.reward_function() is task.reward_function()
    live = task.reference()
    assert tiny(model=live).reference() is live
    assert tiny().reward_function() is word_count
