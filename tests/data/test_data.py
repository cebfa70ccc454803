"""Rows as other people write them: files, data sets, conversations; and what a reward is given of them."""

from __future__ import annotations

import copy
import gzip
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import gpt2, word_tokenizer

import lmgym  # noqa: F401
from lmgym.data.prompts import PromptText, columns_of, read_prompts
from lmgym.data.rows import read_rows
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.models.causal import CausalLM, freeze
from lmgym.tasks import Task, make_task

TEXTS = ("the film was", "wé liked", "  it\u2028is")
ROWS = [{"prompt": text, "answer": index} for index, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


class DataSet:
    """What `datasets.Dataset` shows of itself: no `Sequence`, rows by number, and names of columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.column_names = list(rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


class Table:
    """What a pandas table shows of itself: iterating gives its columns' names."""

    iloc = None

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.columns = list(rows[0])

    def __iter__(self) -> Any:
        return iter(self.columns)

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return self._rows


# --- files


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "jsonlines", "json", "JSONL", "NdJson"])
@pytest.mark.parametrize("written", [lambda t: t, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")])
def test_json_lines_by_any_ending_with_any_line_ends(ending: str, written: Any, tmp_path: Path) -> None:
    path = tmp_path / f"p.{ending}"
    path.write_bytes(written(LINES).encode())
    prompts = read_prompts(path)
    assert prompts == TEXTS
    assert columns_of(prompts) == {"answer": [0, 1, 2]}


@pytest.mark.parametrize("name", ["p.txt", "p.TXT"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_files_with_a_mark_and_any_line_ends(name: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(("\ufeff" + end.join(TEXTS)).encode())
    assert read_prompts(path) == TEXTS


def test_arrays_tables_and_packed_files(tmp_path: Path) -> None:
    array, packed, table, tabs = (tmp_path / name for name in ("p.json", "p.jsonl.gz", "p.csv", "p.tsv"))
    array.write_text(json.dumps(ROWS, indent=2))
    packed.write_bytes(gzip.compress(LINES.encode()))
    table.write_text('prompt,answer\n"the film, ""was""\ngood",0\na,1\n')
    tabs.write_text("answer\tprompt\r\n0\tthe film\r\n")
    assert read_prompts(array) == read_prompts(packed) == TEXTS
    assert read_prompts(table) == ('the film, "was"\ngood', "a")
    assert columns_of(read_prompts(table)) == {"answer": ["0", "1"]}
    assert read_prompts(tabs) == ("the film",)


def test_parquet_files_need_pyarrow_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidArgumentError, match="needs pyarrow to be read: `pip install pyarrow`"):
        read_prompts(path)


def test_parquet_files_are_read(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    prompts = read_prompts(tmp_path / "p.parquet")
    assert (prompts, columns_of(prompts)) == (TEXTS, {"answer": [0, 1, 2]})
    (tmp_path / "q.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidArgumentError, match="q.parquet' is no Parquet file"):
        read_prompts(tmp_path / "q.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.md", b"a", r"p.md' must have one of the endings .*'.txt'.* got '.md'"),
        ("prompts", b"a", "must have one of the endings .* got ''"),
        ("p.txt", "a\nb\u00e9".encode("latin-1"), "must be UTF-8, and line 2 is not"),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "must be UTF-8, and line 1 is not"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "line 1 of '.*p.jsonl' has half of a surrogate pair"),
        ("p.jsonl", b"[" * 100_000, "line 1, is not JSON"),
        ("p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "line 1, is not JSON"),
        ("p.json", b'[{"prompt": "a"},', "is not JSON"),
        ("p.json", b'["a", 3]', r"must hold texts or rows with a \"prompt\", and item 1 of '.*p.json' is 3"),
        ("p.csv", b"prompt,answer\na\n", "line 2, must have the columns of the first line"),
        ("p.csv", b"question\na\n", r"rows with a \"prompt\", and line 2 of .* has the columns \['question'\]"),
        ("p.csv", b'prompt\n"a', "line ., is not CSV"),
        ("p.jsonl.gz", b"no gzip", "cannot be read"),
        ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        ("p.txt", b"", "must be a non-empty list of texts or rows"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidArgumentError, match=message):
        read_prompts(tmp_path / name)


# --- rows


@pytest.mark.parametrize("source", [ROWS, tuple(ROWS), DataSet(ROWS), Table(ROWS)])
def test_rows_of_lists_data_sets_and_tables(source: Any) -> None:
    prompts = read_prompts(source)
    assert prompts == TEXTS
    assert columns_of(prompts) == {"answer": [0, 1, 2]}
    assert [row.location for row in read_rows("prompts", source, "prompt")] == ["item 0", "item 1", "item 2"]


def test_a_column_that_a_row_lacks_is_none() -> None:
    assert columns_of(read_prompts([{"prompt": "a"}, {"prompt": "b", "answer": 3}])[:1]) == {"answer": [None]}


@pytest.mark.parametrize(
    "source", [3, b"a", {"prompt": "a"}, {"a"}, iter(["a"]), np.array("a"), np.array([["a"]]), None]
)
def test_what_is_no_list_of_rows_is_refused(source: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`prompts` must be a non-empty list of texts or rows, got"):
        read_prompts(source)


def test_a_prompt_keeps_its_row_through_copies() -> None:
    prompt = PromptText("a", {"answer": 3}, [{"role": "user", "content": "a"}], "line 3")
    for copied in (copy.copy(prompt), copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (copied, vars(copied)) == ("a", vars(prompt))
    assert read_prompts([PromptText("a", {"answer": 3})])[0].columns == {"answer": 3}  # type: ignore[attr-defined]


def test_splits_of_a_task_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": 3}\n')
    task = Task(
        name="t",
        model="m",
        reward="r",
        prompts={"train": tmp_path / "train.jsonl", "test": DataSet([{"prompt": "b", "answer": 4}])},  # type: ignore[dict-item]
        kl_coef=0.1,
        max_new_tokens=2,
    )
    assert {split: (tuple(texts), columns_of(texts)) for split, texts in task.prompts.items()} == {
        "train": (("a",), {"answer": [3]}),
        "test": (("b",), {"answer": [4]}),
    }


# --- what a reward is given


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    tokenizer = word_tokenizer()
    return CausalLM(freeze(gpt2(len(tokenizer))), tokenizer)


QUESTIONS = [{"prompt": "the film was", "answer": "good", "id": 1}, {"prompt": "a book", "answer": "dull", "id": 2}]


def task_of(lm: CausalLM, reward: Any, prompts: Any = QUESTIONS, **changes: Any) -> Task:
    splits = {"train": prompts, "test": prompts}
    fields = {"name": "t", "kl_coef": 0.2, "max_new_tokens": 3} | changes
    return Task(model=lm, reward=reward, prompts=splits, **fields)  # type: ignore[arg-type]


def test_every_column_of_the_row_reaches_the_reward_on_every_path(lm: CausalLM) -> None:
    from lmgym.models.policy import CausalPolicy
    from lmgym.optimum.tree import Tree
    from lmgym.rollout import collect

    seen: list[tuple[list[str], list[str], list[int]]] = []

    def correct(prompts: list[str], completions: list[str], answer: list[str], id: list[int], **_: Any) -> list[float]:
        seen.append((prompts, answer, id))
        return [float(a in c) for a, c in zip(answer, completions, strict=True)]

    expected = {row["prompt"]: (row["answer"], row["id"]) for row in QUESTIONS}
    task = task_of(lm, correct, max_new_tokens=1)
    vector = gym.make_vec("lmgym/RLHF-v0", num_envs=4, task=task, device="cpu")
    vector.reset(seed=0)
    vector.step(np.full(4, 5))
    collect(vector, CausalPolicy(lm), 4)  # type: ignore[arg-type]
    single = gym.make("lmgym/RLHFBandit-v0", task=task, device="cpu")
    single.reset(seed=0)
    *_, info = single.step(np.array([lm.tokenizer.convert_tokens_to_ids("good")]))
    assert info["score"] == float(info["prompt"] == "the film was")
    tree = Tree.of(task)
    good = tree.episodes.response_ids[:, 0] == lm.tokenizer.convert_tokens_to_ids("good")
    assert (tree.scores.flatten() == (good & (tree.episodes.prompt_index == 0)) + 0.0).sum() > len(good) - 4
    assert len(seen) >= 4
    for prompts, answers, ids in seen:
        assert [expected[prompt] for prompt in prompts] == list(zip(answers, ids, strict=True))


def test_a_prompt_from_outside_has_the_columns_with_none_in_them(lm: CausalLM) -> None:
    seen: list[list[Any]] = []

    def reward(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
        seen.append(answer)
        return [0.0] * len(completions)

    env = gym.make("lmgym/RLHF-v0", task=task_of(lm, reward), device="cpu")
    for prompt in ("a meal", "a book"):
        env.reset(options={"prompt": prompt})
        env.step(1)
    assert seen[-2:] == [[None], ["dull"]]


def test_two_rows_of_one_prompt_are_told_apart_by_their_index_only(lm: CausalLM) -> None:
    def reward(completions: list[str], answer: list[int], **_: Any) -> list[float]:
        return [float(a) for a in answer]

    rows = [{"prompt": "a book", "answer": 1}, {"prompt": "a book", "answer": 2}]
    env = gym.make("lmgym/RLHF-v0", task=task_of(lm, reward, rows), device="cpu", kl_coef=0.0)
    for index, answer in ((0, 1.0), (1, 2.0)):
        env.reset(options={"prompt_index": index})
        assert env.step(1)[1] == answer
    with pytest.raises(InvalidArgumentError, match="must not have the prompt 'a book' in two rows with other columns"):
        env.reset(options={"prompt": "a book"})


def test_columns_survive_a_change_of_the_task(lm: CausalLM) -> None:
    task = task_of(lm, "r")
    assert columns_of(make_task(task, kl_coef=0.3, model=lm).prompts["train"])["answer"] == ["good", "dull"]
    changed = make_task("reviews", prompts=QUESTIONS)
    assert columns_of(changed.prompts["test"]) == {"answer": ["good", "dull"], "id": [1, 2]}


# --- prompts that are too long

LONG = [
    {"prompt": "the film was", "answer": 0},
    {"prompt": "the film was not good and the book", "answer": 1},
    {"prompt": "it", "answer": 2},
]


def make(lm: CausalLM, **changes: Any) -> Any:
    fields = {"prompts": LONG, "reward": "conftest:word_count", "max_new_tokens": 3, "max_prompt_tokens": 4} | changes
    return gym.make("lmgym/RLHF-v0", model=lm, device="cpu", **fields).unwrapped


def test_a_prompt_that_is_too_long_is_named(lm: CausalLM, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in LONG))
    with pytest.raises(InvalidArgumentError, match="at most 4 tokens each, and line 2 of .* has 8 .*Raise `max"):
        make(lm, prompts=str(path))
    with pytest.raises(InvalidArgumentError, match="item 0 has 3 .*; item 1 has 8 .* lower `max_new_tokens` to 40"):
        make(lm, max_prompt_tokens=None, max_new_tokens=46)
    with pytest.raises(InvalidArgumentError, match="`max_new_tokens` must be at most 47, got 48"):
        make(lm, max_prompt_tokens=None, max_new_tokens=48)
    with pytest.raises(InvalidArgumentError, match="`max_prompt_tokens` must be at most 45, got 46"):
        make(lm, max_prompt_tokens=46)
    with pytest.raises(InvalidArgumentError, match="Raise `max_prompt_tokens`"):
        make(lm, prompts=LONG[1:2], on_long="skip")
    with pytest.raises(LmGymError, match="`on_long` must be one of"):
        make(lm, on_long="cut")


def test_long_prompts_are_left_out_with_their_answers(lm: CausalLM) -> None:
    with pytest.warns(UserWarning, match="item 1 has 8 .* They are left out"):
        env = make(lm, on_long="skip")
    assert (list(env.task.prompts["train"]), columns_of(env.task.prompts["train"])) == (
        ["the film was", "it"],
        {"answer": [0, 2]},
    )
    assert len(env.engine.prompts) == 2
    assert env.observation_space["input_ids"].shape == (4 + 3,)


def test_the_end_of_long_prompts_is_kept(lm: CausalLM) -> None:
    env = make(lm, on_long="truncate_left")
    assert [text.strip() for text in env.task.prompts["test"]] == ["the film was", "good and the book", "it"]
    assert columns_of(env.task.prompts["train"]) == {"answer": [0, 1, 2]}
    assert make(lm, max_prompt_tokens=8).task.prompts["train"] == tuple(row["prompt"] for row in LONG)


def test_a_start_token_stays_in_front_of_what_is_cut() -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[start])
    env = make(CausalLM(freeze(gpt2(len(tokenizer))), tokenizer), on_long="truncate_left")
    ids = env.engine.prompts[1].ids
    assert (ids[0], tokenizer.decode(ids[1:])) == (start[1], "and the book")
