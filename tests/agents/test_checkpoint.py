"""How a checkpoint takes the place of the one before, and what is noticed when it is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kills import Killed, survives

from agents.checkpoint import MANIFEST, newest, recover, replacing, verify
from lmgym.files import RunFileError


def write(directory: Path, text: str) -> None:
    with replacing(directory, {"said": text}) as scratch:
        (scratch / "weights").write_text(text)
        (scratch / "mask").mkdir()
        (scratch / "mask" / "weights").write_text(f"mask of {text}")


def go_on(directory: Path, text: str) -> None:
    recover(directory)
    write(directory, text)


def read(directory: Path) -> str:
    text = (directory / "weights").read_text()
    assert (directory / "mask" / "weights").read_text() == f"mask of {text}"
    assert verify(directory).notes == {"said": text}
    return text


# -- taking the place of the one before ------------------------------------------------------------------------------


def test_the_new_takes_the_place_of_the_old_and_nothing_else_is_left(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint", "old")
    with replacing(tmp_path / "checkpoint", {"said": "new"}) as scratch:
        (scratch / "weights").write_text("new")
        assert read(tmp_path / "checkpoint") == "old"
    assert (tmp_path / "checkpoint" / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_where_the_writing_fails_the_old_stays(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint", "old")
    with pytest.raises(OSError, match="disk full"), replacing(tmp_path / "checkpoint") as scratch:
        (scratch / "weights").write_text("new")
        raise OSError("disk full")
    assert read(tmp_path / "checkpoint") == "old"
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_where_the_last_rename_fails_the_old_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "checkpoint", "old")
    rename = os.replace

    def failing(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("stale handle")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="stale handle"):
        write(tmp_path / "checkpoint", "new")
    assert read(tmp_path / "checkpoint") == "old"
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("two years")
    with pytest.raises(RunFileError, match=r"holds thesis\.tex: it would be lost"):
        write(tmp_path, "weights")
    with pytest.raises(RunFileError, match="must be a directory, got the file"):
        write(tmp_path / "thesis.tex", "weights")
    assert (tmp_path / "thesis.tex").read_text() == "two years"


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "theirs")
    (tmp_path / "checkpoint").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "checkpoint", "mine")
    assert not (tmp_path / "checkpoint").is_symlink()
    assert (read(tmp_path / "checkpoint"), read(tmp_path / "elsewhere")) == ("mine", "theirs")


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_before_any_file_operation_of_saving_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in a row: the process that goes on from what the first kill left is killed in the same place."""
    directory = tmp_path / "check[point]"
    write(directory, "first")
    operation = 0
    done = False
    while not done:
        operation += 1
        before = read(directory)
        texts = [f"{operation}a", f"{operation}b"]
        done = True
        for text in texts:
            done &= survives(partial(go_on, directory, text), operation, monkeypatch)
            found = newest(directory)
            assert found is not None
            assert read(found) in (before, *texts)
        recover(directory)
        assert os.listdir(tmp_path) == ["check[point]"]
        assert read(directory) in (before, *texts)
    assert operation > 20
    assert read(directory) == texts[1]


def test_a_kill_between_the_renames_leaves_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are whole then, and the newest wins; a second kill does not bring the oldest back."""
    directory = tmp_path / "checkpoint"
    rename = os.replace

    def dying(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp") or target == directory:
            raise Killed
        rename(source, target)

    write(directory, "1")
    for text in ("2", "3"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", dying)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            write(directory, text)
    assert not directory.exists()
    assert len(os.listdir(tmp_path)) == 3  # both of the first kill, and the second's own: there was none to move away
    found = newest(directory)
    assert found is not None
    assert read(found) == "3"
    recover(directory)
    assert read(directory) == "3"
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert verify(directory).serial == 3


def test_only_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoint"
    outside = tmp_path / "outside"
    write(directory, "whole")
    write(outside, "theirs")
    (directory.parent / ".checkpoint.123.tmp").mkdir()
    (directory.parent / ".checkpoint.123.old").symlink_to(outside)
    for name in (".checkpoint", "checkpoint.old", ".other.1.tmp"):
        (directory.parent / name).write_text("mine")
    recover(directory)
    assert sorted(os.listdir(directory.parent)) == [".checkpoint", ".other.1.tmp", "checkpoint", "checkpoint.old"]
    assert (read(directory), read(outside)) == ("whole", "theirs")


def test_a_damaged_remainder_is_named_and_kept(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint", "old")
    left = tmp_path / ".checkpoint.123.old"
    os.replace(tmp_path / "checkpoint", left)
    (left / "weights").write_text("odl")
    for read_it in (newest, recover):
        with pytest.raises(RunFileError, match=r"123\.old/weights` was changed or damaged"):
            read_it(tmp_path / "checkpoint")
    assert left.is_dir()


# -- what is noticed -------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n{}"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a huge number": lambda path: path.write_text('{"serial": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["weights", "mask/weights", MANIFEST])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    write(tmp_path, "numbers")
    damage(tmp_path / name)
    with pytest.raises(RunFileError) as caught:
        verify(tmp_path)
    assert str(tmp_path if name == MANIFEST else tmp_path / name) in str(caught.value)


@pytest.mark.slow
def test_no_byte_of_the_manifest_can_flip_unnoticed(tmp_path: Path) -> None:
    write(tmp_path, "numbers")
    content = (tmp_path / MANIFEST).read_bytes()
    meaning = json.loads(content)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / MANIFEST).write_bytes(changed)
        try:
            verify(tmp_path)
        except RunFileError:
            continue
        assert json.loads(changed) == meaning, position  # white space


def test_a_file_of_another_checkpoint_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "mine", "mine")
    write(tmp_path / "theirs", "also")
    shutil.copy(tmp_path / "theirs" / "weights", tmp_path / "mine" / "weights")
    with pytest.raises(RunFileError, match="weights` was changed or damaged"):
        verify(tmp_path / "mine")


def test_a_file_that_was_added_is_noticed_unless_it_is_hidden(tmp_path: Path) -> None:
    write(tmp_path, "numbers")
    (tmp_path / ".DS_Store").write_text("")
    assert read(tmp_path) == "numbers"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RunFileError, match=r"adapter_config\.json` is no part of the checkpoint"):
        verify(tmp_path)
