"""Files are written whole and never through a link, and what cannot be read is named."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lmgym.files import (
    RunFileError,
    create,
    open_to_append,
    read_json,
    read_text,
    remove,
    replace_directory,
    write_atomically,
)


def test_a_failed_atomic_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_written_file_may_be_read_by_whom_the_process_allows(tmp_path: Path) -> None:
    write_atomically(tmp_path / "mine", b"\x89PNG")
    (tmp_path / "plain").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("mine", "plain")]
    assert modes[0] == modes[1]
    assert (tmp_path / "mine").read_bytes() == b"\x89PNG"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    link = tmp_path / "link"
    outside.write_text("theirs")
    link.symlink_to(outside)
    with pytest.raises(RunFileError, match="link` must be no link, and is one: nothing is written through it"):
        open_to_append(link)
    with pytest.raises(FileExistsError):
        create(link)
    write_atomically(link, "mine")
    assert (link.read_text(), link.is_symlink(), outside.read_text()) == ("mine", False, "theirs")


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    directory = tmp_path / "parent" / "built"
    for text in ("first", "second"):
        with replace_directory(directory) as scratch:
            (scratch / text).write_text(text)
            assert (directory / "first").exists() == (text == "second")
        assert os.listdir(directory) == [text]
    with pytest.raises(OSError, match="disk full"), replace_directory(directory) as scratch:
        (scratch / "third").write_text("half")
        raise OSError("disk full")
    assert os.listdir(directory) == ["second"]
    assert os.listdir(directory.parent) == ["built"]


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert [path.name for path in tmp_path.rglob("*")] == ["outside", "file"]
    remove(tmp_path / "outside")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a file, and there is none"),
        (b"\xff\xfe{}", "must be UTF-8 text, and is not"),
        (b"", "must be JSON, and is damaged"),
        (b'{"a": ', "must be JSON, and is damaged"),
        (b"[" * 100_000, "must be JSON, and is damaged"),
        (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON, and is damaged"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunFileError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_directory_and_a_file_that_is_too_large_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(RunFileError, match="long` must have at most 10 bytes, got 11"):
        read_text(tmp_path / "long", max_bytes=10)
