"""Tasks on public checkpoints, from local directories of their formats; nothing here asks the hub."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import gymnasium as gym
import huggingface_hub
import numpy as np
import pytest
import torch
from commands import run_command_here
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from agents.comparison.frontier import find_frontier
from agents.comparison.scales import known_optimum
from lmgym.data import sets
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError, LmGymError, RewardError
from lmgym.models import loading
from lmgym.rewards.classifier import load_reward_model
from lmgym.tasks import Task, gsm8k, hh, imdb, make_task, register_task, registered_tasks
from lmgym.testing import check_task

ON_HUB = sorted(name for name, registered in registered_tasks().items() if registered.on_hub)
EPISODES = 5
HORIZON = 12


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The parts of each task as arguments of an environment."""
    return {name: getattr(checkpoints, name)(tmp_path_factory.mktemp(name)) for name in ON_HUB}


@pytest.fixture(scope="module")
def envs(local: dict[str, dict[str, Any]]) -> dict[str, RLHFVectorEnv]:
    made = {}
    for name, parts in local.items():
        made[name] = RLHFVectorEnv(
            1, task=name, split="test", device="cpu", kl_coef=0.0, max_new_tokens=HORIZON, **parts
        )
    return made


# --- names --------------------------------------------------------------------------------------------------------


def test_the_tasks_are_there() -> None:
    assert ON_HUB == ["gsm8k", "hh", "imdb", "tldr"]


@pytest.mark.parametrize("name", ON_HUB)
def test_naming_a_task_downloads_nothing(name: str) -> None:
    task = make_task(name, kl_coef=0.5)
    assert set(task.prompts) >= {"train", "test"}
    assert ("test" in task.prompts, "dev" in task.prompts) == (True, False)
    assert task.prompts.source in repr(task)  # type: ignore[attr-defined]
    assert not task.optima
    assert gym.spec(registered_tasks()[name].env_id).kwargs == {"task": name}


@pytest.mark.parametrize("name", ON_HUB)
def test_comparisons_do_not_load_a_task_to_find_that_its_optimum_is_not_known(name: str) -> None:
    assert known_optimum(name) is None
    assert find_frontier(name) is None


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_HUB)
def test_a_score_does_not_depend_on_the_other_episodes(name: str, envs: dict[str, RLHFVectorEnv]) -> None:
    env = envs[name]
    prompts = [env.engine.prompts[i % len(env.engine.prompts)] for i in range(EPISODES)]
    tokens = np.random.default_rng(0).integers(0, env.single_action_space.n, (EPISODES, HORIZON))
    together = env.replay(prompts, tokens).rewards
    alone = np.concatenate([env.replay(prompts[i : i + 1], tokens[i : i + 1]).rewards for i in range(EPISODES)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ON_HUB)
def test_other_parts_leave_the_rest_of_a_task(name: str, local: dict[str, dict[str, Any]]) -> None:
    task = make_task(name)
    changed = make_task(name, **local[name])
    for field in ("kl_coef", "max_new_tokens", "temperature", "missing_eos_penalty", "max_prompt_tokens", "on_long"):
        assert getattr(changed, field) == getattr(task, field)
    assert changed.prompts["test"] is make_task(name, kl_coef=0.3, **local[name]).prompts["test"]  # read once


def test_a_task_of_the_hub_can_be_sent_to_another_process(local: dict[str, dict[str, Any]]) -> None:
    task = make_task("gsm8k", **local["gsm8k"])
    assert copy.deepcopy(task).prompts is task.prompts
    sent = pickle.loads(pickle.dumps(task))
    assert sent.prompts["test"] == task.prompts["test"]
    assert sent.prompts["test"][0].columns == task.prompts["test"][0].columns  # type: ignore[attr-defined]


def test_the_whole_kit_passes_a_task_of_the_hub(local: dict[str, dict[str, Any]]) -> None:
    check_task(make_task("tldr", max_new_tokens=4, **local["tldr"]), samples=2)


def test_a_review_is_cut_in_half_and_the_policy_reads_its_end(envs: dict[str, RLHFVectorEnv]) -> None:
    task = envs["imdb"].task
    assert [len(task.prompts[split]) for split in ("train", "validation", "test")] == [16, 4, 20]
    assert not set(task.prompts["train"]) & set(task.prompts["validation"])
    trained: list[Any] = [*task.prompts["train"], *task.prompts["validation"]]
    words = [checkpoints.WORDS[i % len(checkpoints.WORDS)] for i in range(400)]
    texts = [["train", *words[i : i + 8 + 12 * i]] for i in range(20)]
    assert {text.columns["review"] for text in trained} == {" ".join(text[: len(text) // 2]) for text in texts}
    longest = max(trained, key=lambda text: len(text.columns["review"]))
    assert longest.columns["review"].endswith(longest)
    assert len(longest) < len(longest.columns["review"])
    assert len(envs["imdb"].engine.lm.encode(longest)) == 64


def test_the_score_of_a_review_is_the_probability_of_label_1_of_its_end(
    local: dict[str, dict[str, Any]], envs: dict[str, RLHFVectorEnv]
) -> None:
    directory = local["imdb"]["reward"]
    tokenizer = AutoTokenizer.from_pretrained(directory, truncation_side="left")
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    review = "good " * 200
    given = {"prompts": ["old film", "story"], "completions": [" was", " it"], "review": [None, review]}
    scores = envs["imdb"].engine.reward(**given)
    for text, score in zip(("old film was", review + " it"), scores, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=96, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            probabilities = model(**inputs).logits.softmax(-1)
        assert score == pytest.approx(probabilities[0, 1].item(), abs=1e-5)
        assert abs(score - 0.5) > 1e-4  # and not that of label 0


def test_a_summary_is_scored_at_its_eos(local: dict[str, dict[str, Any]], envs: dict[str, RLHFVectorEnv]) -> None:
    env = envs["tldr"]
    assert {split: len(texts) for split, texts in env.task.prompts.items()} == dict.fromkeys(env.task.prompts, 5)
    assert env.engine.reward.reads_ids  # type: ignore[attr-defined]
    prompt = env.engine.prompts[0]
    model = AutoModelForSequenceClassification.from_pretrained(local["tldr"]["reward"])
    for response, penalty in (([40, 41, 0], 0.0), ([40] * HORIZON, 1.0)):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([[*prompt.ids, *response]])).last_hidden_state[0, -1]
            expected = model.score(hidden).item() - penalty
        padded = np.array([response + [7] * (HORIZON - len(response))])
        assert env.replay([prompt], padded).rewards.sum() == pytest.approx(expected, abs=1e-5)


DIALOGUE = "\n\nHuman: What is\n\nthis?\n\nAssistant: A film.\n\nHuman: Good?\n\nAssistant: Very."
ASKED = [
    {"role": "user", "content": "What is\n\nthis?"},
    {"role": "assistant", "content": "A film."},
    {"role": "user", "content": "Good?"},
]


def test_a_dialogue_is_a_conversation_and_back() -> None:
    assert hh.parse_dialogue(DIALOGUE) == ASKED
    assert hh.write_dialogue(ASKED) + " Very." == DIALOGUE
    assert hh.write_dialogue([{"role": "system", "content": "Be kind."}, *ASKED]) == hh.write_dialogue(ASKED)
    starts_late = DIALOGUE[len("\n\nHuman: What") :]
    for broken in ("", "Human: a", starts_late, "\n\nHuman: a\n\nHuman: b", "\n\nHuman:\n\nAssistant: b"):
        assert not hh.parse_dialogue(broken)


def test_two_reward_models_read_the_dialogue_as_the_data_set_writes_it(
    local: dict[str, dict[str, Any]], envs: dict[str, RLHFVectorEnv]
) -> None:
    env = envs["hh"]
    assert {split: len(texts) for split, texts in env.task.prompts.items()} == {"train": 8, "test": 8}
    prompt = env.task.prompts["test"][0]
    assert prompt == "<|im_start|>user\ni saw test helpful 0<|im_end|>\n<|im_start|>assistant\n"
    text = "\n\nHuman: i saw test helpful 0\n\nAssistant: it was good"
    parts = [load_reward_model(name, "cpu")([text], [""])[0] for name in local["hh"]["reward"]]
    conversation = [{"role": "user", "content": "i saw test helpful 0"}]
    (score,) = env.engine.reward(prompts=[prompt], completions=[" it was good"])
    assert score == pytest.approx(sum(parts) / 2, abs=1e-5)
    assert make_task("hh", reward=local["hh"]["reward"][0]).reward_weights is None
    with pytest.raises(InvalidArgumentError, match="must be conversations, got 'it'"):
        hh.DialogueScore(load_reward_model(local["hh"]["reward"][0], "cpu"))(["it"], ["was"])
    assert conversation == prompt.messages  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("so it is 18.\n#### 18", "I think\n#### 18", 1.0),
        ("#### 18", "#### 19", 0.0),
        ("#### 18", "18", 0.0),
        ("#### 1,001", "#### $1001.", 1.0),
        ("#### 18", "#### 17 no, #### 18.00", 1.0),
        ("#### 18", "#### 18 no, #### 17", 0.0),
        ("#### -3", "####-3", 1.0),
        ("#### 0", "#### 0", 1.0),
        ("7", "#### 7", 1.0),
        (7, "#### 7", 1.0),
        ("#### 7", "#### 1.2.3", 0.0),
    ],
)
def test_an_answer_is_right_if_its_last_marked_number_is(answer: Any, response: str, score: float) -> None:
    reward = gsm8k.AnswerReward()
    assert reward([""], [response], answer=[answer]) == [score]
    assert reward([[]], [[{"role": "assistant", "content": response}]], answer=[answer]) == [score]


def test_an_answer_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="`answer` must be a number, or a solution .* got 'none'"):
        gsm8k.AnswerReward()([""], [""], answer=["none"])
    with pytest.raises(InvalidArgumentError, match="got None"):
        gsm8k.AnswerReward()([""], [""])


def test_a_problem_is_asked_in_the_chat_template(envs: dict[str, RLHFVectorEnv]) -> None:
    prompt: Any = envs["gsm8k"].task.prompts["test"][0]
    question = checkpoints.QUESTION.format(10, 10000)
    assert prompt == f"<|im_start|>user\n{question} {gsm8k.INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.columns["answer"].endswith("#### 10,010")


# --- in place of a part -------------------------------------------------------------------------------------------


def test_another_reward_model_is_read_as_the_task_reads_its_own(local: dict[str, dict[str, Any]]) -> None:
    directory = local["imdb"]["reward"]
    assert make_task("imdb", reward=directory).reward == imdb.imdb().reward.of_model(directory)  # type: ignore[union-attr]
    assert make_task("imdb", reward="conftest:word_count").reward == "conftest:word_count"
    first, second = local["hh"]["reward"]
    both: Any = make_task("hh", reward=[first, "conftest:word_count"]).reward
    assert (both[0].model, both[1]) == (first, "conftest:word_count")
    alone: Any = make_task("hh", reward=second).reward
    assert (alone.model, alone.read) == (second, hh.DialogueScore)
    assert make_task("reviews", reward=directory).reward == directory


def test_prompts_of_ones_own_take_the_place_of_the_data_set(local: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": [{"role": "user", "content": "Two and two?"}], "answer": 4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task("gsm8k", model=local["gsm8k"]["model"], prompts=str(path))
    assert list(task.prompts["test"]) == ["<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"]


@pytest.mark.parametrize("folder", ["main", "data", ""])
def test_files_may_lie_in_the_folder_of_the_hub_or_at_the_top(
    folder: str, local: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(Path(local["gsm8k"]["prompts"]) / "main", tmp_path / folder, dirs_exist_ok=True)
    (tmp_path / folder / "training_notes.jsonl").write_text("no rows")  # which only begins as a split does
    assert len(sets.read_split(str(tmp_path), "main", "train", "question")) == 6


def test_a_data_set_is_read_again_when_its_files_have_changed(local: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(local["gsm8k"]["prompts"], tmp_path, dirs_exist_ok=True)
    parts = {"model": local["gsm8k"]["model"], "prompts": str(tmp_path)}
    first = make_task("gsm8k", **parts)
    assert len(first.prompts["test"]) == 6
    checkpoints.write_rows(tmp_path / "main" / "test-00001.parquet", [{"question": "One?", "answer": "#### 1"}])
    assert len(make_task("gsm8k", **parts).prompts["test"]) == 7


# --- what can be wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rename", r"files such as main.test.parquet or test.jsonl.gz, and '.*' has README.md, main.other"),
        ("columns", r"must hold rows with a .answer., and row 0 of '.*' has the columns \['question'\]"),
        ("damage", r"`prompts` file '.*' is no Parquet file"),
    ],
)
def test_a_damaged_directory_is_named(
    change: str, message: str, local: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(local["gsm8k"]["prompts"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").write_text("# A data set")
    (file,) = (tmp_path / "main").glob("test*")
    if change == "rename":
        file.rename(file.with_name("other.parquet"))
    elif change == "columns":
        checkpoints.write_rows(file, [{"question": "One?"}])
    else:
        file.write_bytes(b"PAR1")
    with pytest.raises(InvalidArgumentError, match=message):
        make_task("gsm8k", model=local["gsm8k"]["model"], prompts=str(tmp_path)).prompts["test"]


def test_a_directory_that_is_not_there() -> None:
    with pytest.raises(InvalidArgumentError, match="directory with the files of stanfordnlp/imdb, .* no 'data/imbd'"):
        make_task("imdb", prompts="data/imbd")
    with pytest.raises(InvalidArgumentError, match="there is no directory '../x'"):
        sets.read_split("../x", "", "train", "text")


def hub(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[], object], cached: str | None = None
) -> list[dict[str, Any]]:
    """Stands in for the hub, which answers so; and for its cache, which holds this directory."""
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        if cached is None:
            raise LocalEntryNotFoundError("nothing in the cache")
        return cached

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: answer())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def fail(error: Exception) -> Callable[[], object]:
    def answer() -> object:
        raise error

    return answer


def test_only_the_folder_of_the_data_set_is_downloaded(
    local: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(monkeypatch, lambda: None, local["gsm8k"]["prompts"])
    assert len(gsm8k.read_problems(gsm8k.DATA, "test")) == 6
    assert asked == [{"name": gsm8k.DATA, "repo_type": "dataset", "allow_patterns": ["main/*"]}]


def test_without_a_network_the_cache_is_read(local: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, fail(OSError("no network")), local["gsm8k"]["prompts"])
    assert len(gsm8k.read_problems(gsm8k.DATA, "test")) == 6
    assert asked[0]["local_files_only"]


def test_what_to_do_without_a_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, fail(OSError("no network")))
    with pytest.raises(
        InvalidArgumentError, match=r"cannot be asked \(no network\)\. .*`hf download openai/gsm8k --repo"
    ):
        gsm8k.read_problems(gsm8k.DATA, "test")


def test_a_data_set_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    hub(monkeypatch, fail(RepositoryNotFoundError("not found", response=response)))
    with pytest.raises(InvalidArgumentError, match="there is no 'openai/gsm8k'. Of a private one, log in first"):
        gsm8k.read_problems(gsm8k.DATA, "test")


def test_nothing_that_is_downloaded_is_unpickled(local: dict[str, dict[str, Any]]) -> None:
    options: list[dict[str, Any]] = []

    class Recording:
        @classmethod
        def from_pretrained(cls, name: str, **given: Any) -> Any:
            options.append(given)
            if not Path(name).is_dir():
                raise OSError("it has no model.safetensors. Please do not set `use_safetensors=True`.")
            return AutoModelForCausalLM.from_pretrained(name, **given)

    loading.load_model("model", local["gsm8k"]["model"], Recording, torch.float32)
    with pytest.raises(LmGymError, match=r"as a pickle, which can run code, .* save_pretrained it, and name"):
        loading.load_model("model", "org/name", Recording, torch.float32)
    assert ["use_safetensors" in given for given in options] == [False, True]
    assert not any(given["trust_remote_code"] for given in options)


def test_a_reward_that_needs_another_kind_of_prompt_says_so(local: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(RewardError, match="must be conversations, got 'Is it good"):
        RLHFVectorEnv(1, task="hh", device="cpu", **{**local["hh"], "prompts": ["Is it good?"]})


def test_a_flag_is_a_flag() -> None:
    with pytest.raises(InvalidArgumentError, match="`on_hub` must be True or False"):
        register_task("mine", lambda: Task(name="x"), on_hub=1)  # type: ignore[call-arg,arg-type]


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_HUB)
def test_a_run_says_that_the_optimum_is_not_known(
    name: str, local: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = local[name].get("reward")
    parts = {**local[name], "reward": f"[{','.join(reward)}]" if isinstance(reward, list) else reward}
    run = tmp_path / "run"
    arguments = [f"env.{key}={value}" for key, value in parts.items() if value is not None]
    arguments += [f"hydra.run.dir={run}", "device=cpu", "tracker=none", "env.max_new_tokens=4"]
    run_command_here(
        "agents.train",
        f"task={name}",
        "agent=rloo",
        *("agent.batch_size=8", "total_timesteps=64", "evaluation.samples=2", *arguments),
    )
    assert "V* itself is not known" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["optimum"]["upper"] is None
    run_command_here("agents.evaluate", f"run={run}")
    assert "recorded when it was trained" in capsys.readouterr().out
