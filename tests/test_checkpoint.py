"""How a checkpoint takes the place of the one before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agents.checkpoint import recover, replacing


def write(directory: Path, text: str) -> None:
    with replacing(directory) as scratch:
        (scratch / "weights").write_text(text)


def read(directory: Path) -> str:
    return (directory / "weights").read_text()


def test_the_new_takes_the_place_of_the_old_and_nothing_else_is_left(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint", "old")
    with replacing(tmp_path / "checkpoint") as scratch:
        (scratch / "weights").write_text("new")
        assert read(tmp_path / "checkpoint") == "old"
    assert read(tmp_path / "checkpoint") == "new"
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


def test_what_a_kill_between_the_renames_left_is_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "check[point]"
    write(directory, "old")
    recover(directory)  # nothing to do
    os.replace(directory, tmp_path / ".check[point].123.old")
    recover(directory)
    assert read(directory) == "old"
