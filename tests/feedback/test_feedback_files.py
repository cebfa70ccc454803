"""Files of feedback: what survives them, what they cannot hold, and what is said of damaged ones."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feedback.test_records import CHAT, HARD_TEXTS, JUDGEMENTS

from lmgym.errors import InvalidArgumentError
from lmgym.feedback import parquet
from lmgym.feedback.files import read_records, write_records
from lmgym.feedback.problems import FeedbackFileError
from lmgym.feedback.records import Choice, Completion, Correction, Message, Ranking, Ratings, Record, Skip, Votes

WHO = {"annotator": "Zoë", "time": "2026-11-27T03:40:00.250Z", "seconds": 3.5}
LEFT = Completion(" a", "ppo", "temperature=0.7", -3.25, True)
RIGHT = Completion(" b", log_prob=-1.5, ended=False)


def all_kinds() -> list[Record]:
    """Records of every kind, and with every hard text everywhere."""
    records = [
        Record(text, (*HARD_TEXTS, LEFT, RIGHT), None, f"text-{i}", columns={"note": text, "n": [1, None, {"x": 0.5}]})
        for i, text in enumerate(HARD_TEXTS)
    ]
    records += [Record("p", ("a", "b", "c"), judgement, order_shown=(2, 0, 1), **WHO) for judgement in JUDGEMENTS]
    answers = tuple((Message("assistant", text),) for text in HARD_TEXTS)
    records += [Record(CHAT, answers, Correction(0, answers[1])), Record("p", ("a",), Ratings((0.5,), 0, 1))]
    return records


def read(path: Path) -> list[Record]:
    return list(read_records(path))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["f.jsonl", "f.JSONL.gz", "f.ndjson", "f.parquet"])
def test_every_record_survives_a_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(parquet, "BATCH", 5)
    records = all_kinds()
    assert write_records(tmp_path / name, iter(records)) == len(records)
    again = read(tmp_path / name)
    assert len(again) == len(records)
    for number, (record, expected) in enumerate(zip(again, records, strict=True)):
        assert record == expected, number
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert write_records(tmp_path / name, []) == 0
    assert not read(tmp_path / name)


def choices(prompt: Any, left: Any, right: Any, *, columns: dict[str, Any] | None = None) -> list[Record]:
    return [
        Record(prompt, (left, right), Choice(0, 1), columns=columns or {}),
        Record(prompt, (left, right), Choice(0, 1, strength=2), "x", order_shown=(1, 0), columns=columns or {}, **WHO),
    ]


TEXTS = [
    *choices(HARD_TEXTS[3] + "\r\n\u200b", LEFT, RIGHT),
    Record(" p", (Completion(" \ufeff💥\r\n"), Completion("", ended=True)), Choice(0, 1)),
]
CHATS = choices(CHAT, Completion((Message("assistant", " a"),), ended=True), (Message("assistant", "b\r\n"),))
LABELLED = [
    Record("p", (LEFT, RIGHT, Completion("c")), Ratings((1, 0, 1), 0, 1), "x", order_shown=(2, 1, 0), **WHO),
    Record("p", ("only",), Ratings((0,), 0, 1), columns={"n": 1}),
    Record("q", ("only",), Ratings((1,), 0, 1), columns={"n": 2}),
]


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
@pytest.mark.parametrize(
    ("layout", "records", "style"),
    [
        ("pairs", TEXTS, {}),
        ("pairs", CHATS, {}),
        ("pairs", TEXTS, {"implicit": True}),
        ("pairs", CHATS, {"implicit": True}),
        ("pairs", choices("p", LEFT, RIGHT, columns={"source": "web", "id": 17, "margin": -1.0, "time": "noon"}), {}),
        ("labels", LABELLED, {}),
    ],
)
def test_the_layouts_of_trl_are_lossless_where_they_can_be(
    tmp_path: Path, name: str, layout: str, records: list[Record], style: dict[str, bool]
) -> None:
    pytest.importorskip("pyarrow")
    if "id" in records[-1].columns:
        records = records[:1]  # the other has an id of its own
    write_records(tmp_path / name, records, layout, **style)
    again = read(tmp_path / name)
    assert len(again) == len(records)
    for record, expected in zip(again, records, strict=True):
        assert record == expected


def test_a_text_becomes_a_conversation_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    write_records(path, choices("p", LEFT, RIGHT)[:1], "pairs", chat=True)
    row = json.loads(path.read_text())
    assert row["prompt"] == [{"role": "user", "content": "p"}]
    assert row["rejected"] == [{"role": "assistant", "content": " b"}]
    assert read(path)[0].completions[1] == Completion((Message("assistant", " b"),), log_prob=-1.5, ended=False)


def pair(judgement: Any, k: int = 2, **fields: Any) -> Record:
    return Record("p", tuple("abc"[:k]), judgement, **fields)


@pytest.mark.parametrize(
    ("layout", "record", "lost", "rows"),
    [
        ("pairs", pair(None), "records that nobody has judged", []),
        ("pairs", pair(Skip("same")), "records whose annotator could not say", []),
        ("pairs", pair(Ratings((1, 1), 0, 1)), "ties", []),
        ("pairs", pair(Ranking(((0,), (1,))), 3), "completions that are in no pair", [("a", "b")]),
        ("pairs", pair(Ratings((1, 3), 0, 4)), "the ratings, of which the order and the differences", [("b", "a")]),
        ("pairs", pair(Votes((9, 3))), "the votes, of which the order", [("a", "b")]),
        ("pairs", pair(Correction(1, "B")), "that the better text is an edit of the other", [("B", "b")]),
        (
            "pairs",
            pair(Ranking(((2,), (0, 1))), 3),
            "ties (record 1); that several pairs are one judgement",
            [("c", "a"), ("c", "b")],
        ),
        ("pairs", pair(Choice(0, 1), columns={"chosen": 1}), "the column 'chosen', whose name", [("a", "b")]),
        ("pairs", pair(Choice(0, 1), columns={"margin": 1}), "the column 'margin', whose name", [("a", "b")]),
        ("labels", pair(Choice(1, 0)), "records that do not rate every completion as 0 or 1", [("b", 1), ("a", 0)]),
        ("labels", pair(Ratings((1, None), 0, 1)), "completions without a rating", [("a", 1)]),
        ("labels", pair(Ratings((0.6, 1), 0, 1)), "ratings between 0 and 1, which are rounded", [("a", 1), ("b", 1)]),
        ("demonstrations", pair(Correction(1, "B")), "all but the texts that are to be imitated", [("B",)]),
    ],
)
def test_what_a_layout_cannot_hold_is_said_and_dropped_on_demand(
    tmp_path: Path, layout: str, record: Record, lost: str, rows: list[tuple[Any, ...]]
) -> None:
    path = tmp_path / "f.jsonl"
    with pytest.raises(InvalidArgumentError) as error:
        write_records(path, [record], layout)
    assert lost in str(error.value)
    assert "lossy=true" in str(error.value)
    assert not list(tmp_path.iterdir())
    write_records(path, [record], layout, lossy=True)
    keys = {"pairs": ("chosen", "rejected"), "labels": ("completion", "label"), "demonstrations": ("completion",)}
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [tuple(row[key] for key in keys[layout]) for row in written] == rows


def test_losses_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    records = [pair(Choice(0, 1)), pair(Choice(0, 1, strength=0)), pair(None), pair(Choice(0, 1, strength=0))]
    with pytest.raises(InvalidArgumentError) as error:
        write_records(tmp_path / "f.jsonl", records, "pairs")
    assert "ties (2 records from record 2 on); records that nobody has judged (record 3)" in str(error.value)


def test_a_prompt_that_could_not_be_found_again_is_a_loss(tmp_path: Path) -> None:
    alike = [Record("p", (" ab", " ac"), Choice(0, 1))]
    with pytest.raises(InvalidArgumentError, match="where the prompt ends, in texts that go on alike"):
        write_records(tmp_path / "f.jsonl", alike, "pairs", implicit=True)


def test_neighbours_that_would_melt_together_are_a_loss(tmp_path: Path) -> None:
    twice = [Record("p", ("a",), Ratings((0,), 0, 1))] * 2
    with pytest.raises(InvalidArgumentError, match="that neighbours with one prompt are several judgements"):
        write_records(tmp_path / "f.jsonl", twice, "labels")


# --- what others write


def test_other_columns_are_kept(tmp_path: Path) -> None:
    """A field of another name, in any file, and what a column of somebody else's ranking cannot fill."""
    pyarrow = pytest.importorskip("pyarrow")
    row = {"prompt": "p", "completions": [" a", " b"], "task": "reviews", "gold": [0.5, None], "columns": {"n": 1}}
    expected = Record("p", (" a", " b"), columns={"n": 1, "task": "reviews", "gold": [0.5, None]})
    ranking = {"prompt": "p", "completions": [" a", " b", " c"], "ranking": [2, 0], "annotator": 3, "id": "x"}
    ranked = Record("p", (" a", " b", " c"), Ranking(((2,), (0,))), id="x", columns={"annotator": 3})
    assert read(jsonl(tmp_path / "a.jsonl", row, ranking)) == [expected, ranked]
    table = pyarrow.Table.from_pylist([{**row, "columns": '{"n": 1}'}])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [expected]
    for name in ("again.jsonl", "again.parquet"):
        write_records(tmp_path / name, [expected, ranked])
        assert read(tmp_path / name) == [expected, ranked]
    with pytest.raises(FeedbackFileError, match="`task` must be in the row or in its `columns`, got both."):
        read(jsonl(tmp_path / "c.jsonl", {**row, "columns": {"task": "echo-2"}}))


def test_rows_of_trl_are_read() -> None:
    user = {"role": "user", "content": "hi"}
    good = {"role": "assistant", "content": "hello", "tool_calls": None}
    bad = {"role": "assistant", "content": "go away"}
    chat = Record(
        (Message("user", "hi"),),
        tuple(Completion((Message("assistant", text),), ended=True) for text in ("hello", "go away")),
        Choice(0, 1),
    )
    for row in (
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "hi", "chosen": [user, good], "rejected": [user, bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
    ):
        assert list(read_records([row])) == [chat]
    (record,) = read_records([{"prompt": "Hi!", "chosen": [user, good], "rejected": [user, bad]}])
    assert record.columns == {"prompt_text": "Hi!"}
    implicit = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"}
    (record,) = read_records([implicit])
    assert record.prompt == "\n\nHuman: hi\n\nAssistant:"
    assert [completion.text for completion in record.completions] == [" hello", " go"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "must begin with a prompt where there is no 'prompt', got 'a' and 'b'"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "`text` must be a str or a list of messages, got None"),
        (
            {"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "b"},
            "must be texts where `prompt` is a text",
        ),
        ({"prompt": "p", "completion": "a", "label": 0.5}, "`label` must be true or false, got 0.5"),
        ({"completion": "a", "label": True}, "must have a 'prompt'"),
        ({"prompt": "p", "completion": "a"}, r"must have 'prompt' and 'completions', or \['chosen', 'rejected'\]"),
        ("text", r"must have 'prompt' and 'completions', or .* got an object with \['prompt'\]"),
    ],
)
def test_a_row_that_is_no_record_is_refused(row: object, message: str) -> None:
    with pytest.raises(FeedbackFileError, match=message):
        list(read_records([row]))


# --- damaged files

GOOD = {"prompt": "p", "completions": ["a", "b"], "judgement": {"kind": "choice", "preferred": 0, "other": 1}}


def report_of(path: Path) -> list[str]:
    """What is reported of a file, which yields nothing after its first bad record."""
    seen: list[Record] = []

    def keep(records: Iterator[Record]) -> None:
        seen.extend(records)

    with pytest.raises(FeedbackFileError) as error:
        keep(read_records(path))
    assert len(seen) < error.value.problems[0].first
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + len(error.value.problems)
    return lines


def test_every_bad_line_is_reported_with_its_reason(tmp_path: Path) -> None:
    rated = {"kind": "ratings", "values": [1, float("nan")], "low": 0, "high": 1}
    path = jsonl(
        tmp_path / "f.jsonl",
        {**GOOD, "id": "x"},
        "",
        {**GOOD, "judgement": rated},
        "[1]",
        {**GOOD, "judgement": {"kind": "ranking", "tiers": [[0], [7]]}},
        {**GOOD, "id": "x"},
        {**GOOD, "id": "y"},
        "not json",
        "not json",
    )
    with path.open("ab") as file:
        file.write("caf\xe9\n".encode("latin-1"))
        file.write(json.dumps(GOOD).encode()[:-9])
    head, *lines = report_of(path)
    assert head == f"`source` {str(path)!r} has 8 bad records, and nothing of it was taken:"
    for line, expected in zip(
        lines,
        (
            r"line 3: `values[1]` must be a finite number >= 0 and <= 1, got nan.",
            "line 4: must be an object with named fields, got [1].",
            "line 5: `tiers[1]` must be the index of one of 2 completions, 0 to 1, got 7.",
            "line 6: `id` 'x' is that of line 1 too.",
            "lines 8 to 9: not JSON: Expecting value",
            "line 10: not UTF-8, at byte 3 of the line: save the file as UTF-8",
            "line 11: not JSON: ",
        ),
        strict=True,
    ):
        assert line.strip().startswith(expected)
    assert lines[-1].endswith("; the file ends in the middle of this line")


def test_a_cut_compressed_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl.gz"
    write_records(path, [Record("p", (f"a{i}", "b"), None) for i in range(1000)])
    path.write_bytes(path.read_bytes()[:-20])
    assert "the compressed file is cut or damaged here" in report_of(path)[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", json.dumps(GOOD).encode("utf-16"), "must be JSON lines in UTF-8, and is UTF-16"),
        ("f.jsonl", b"PAR1....", "is a Parquet file, and its name does not end in .parquet"),
        ("f.jsonl", b"\x1f\x8b\x08", "is compressed, and its name does not end in .gz"),
        ("f.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("f.parquet", b"PAR1....", "is no Parquet file, or is cut or damaged"),
        ("f.xlsx", b"", "must have one of the endings"),
        ("f.db", b"SQLite format 3\0 and then nothing of it", "`labels`"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        list(read_records(tmp_path / name))


def test_a_cut_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "f.parquet"
    write_records(path, all_kinds())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InvalidArgumentError, match="is no Parquet file, or is cut or damaged"):
        read(path)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert read(path) == [Record("p", ("a", "b"), Choice(0, 1))]


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(parquet, "BATCH", 50)
    peaks = []
    for size in (200, 1200):
        tracemalloc.start()
        write_records(tmp_path / name, (Record(f"p{i}", ("a" * 500, "b" * 500)) for i in range(size)))
        write_records(tmp_path / f"again-{name}", read_records(tmp_path / name))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000


def test_nothing_is_half_written(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "f.jsonl", GOOD, "not json")
    out = tmp_path / "out.jsonl"
    write_records(out, [pair(Choice(0, 1))])
    before = out.read_bytes()
    for name in ("out.jsonl", "out.jsonl.gz", "out.parquet"):
        with pytest.raises(FeedbackFileError):
            write_records(tmp_path / name, read_records(path))
    assert out.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"f.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("f.csv", {}, "`path` must end in one of"),
        ("f.parquet.gz", {}, "`path` must end in one of"),
        ("f.jsonl", {"layout": "pair"}, "`layout` must be one of .* Did you mean 'pairs'?"),
        ("f.jsonl", {"chat": True}, "`chat` must be False where `layout` is 'records', got True."),
        ("f.jsonl", {"layout": "labels", "implicit": True}, "`implicit` must be False where `layout` is 'labels'"),
    ],
)
def test_a_way_to_write_that_is_none_is_refused(tmp_path: Path, path: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_records(tmp_path / path, [], **arguments)


def test_a_parquet_file_of_pairs_has_the_columns_of_its_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(parquet, "BATCH", 1)
    late = [pair(Choice(0, 1)), pair(Choice(0, 1), columns={"late": 1})]
    with pytest.raises(InvalidArgumentError, match=r"cannot hold the columns \['late'\], which none of the first"):
        write_records(tmp_path / "f.parquet", late, "pairs")
    mixed = [pair(Choice(0, 1), columns={"x": value}) for value in (1, "one")]
    with pytest.raises(InvalidArgumentError, match="cannot hold a column whose values are of several types"):
        write_records(tmp_path / "f.parquet", mixed, "pairs")
    assert not list(tmp_path.iterdir())
