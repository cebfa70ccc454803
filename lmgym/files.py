"""Files and directories of a run: written whole, never through a link, and read with errors that name the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lmgym.errors import LmGymError


class RunFileError(LmGymError, ValueError):
    """A file of a run is missing or damaged, is not as the run left it, or belongs to another process now."""


def hidden_sibling(path: Path, end: str) -> Path:
    """A hidden name beside a path, `.<name>.<16 random digits>.<end>`, that no other process and no link has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{end}")


def create(path: Path) -> BinaryIO:
    """Opens a new file to write; raises `FileExistsError` for one that exists already, a link included."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")


def refuse_link(path: Path) -> None:
    """Raises `RunFileError` for a link where a run is about to write."""
    if path.is_symlink():
        raise RunFileError(f"`{path}` must be no link, and is one: nothing is written through it. Remove it.")


def open_to_append(path: Path) -> TextIO:
    """Opens a text file to write at its end, and creates it where there is none.

    Raises:
        RunFileError: for a link.
    """
    refuse_link(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Gives a new file to write, which replaces the one of this name when the block has ended, and not before.

    A reader sees the old content or the new, never half. Where anything fails, the old content stays. A link of that
    name is replaced, and what it points to is left alone.

    Raises:
        RunFileError: for a directory of that name.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise RunFileError(f"`{path}` must be a file, and is a directory: move it away.")
    temporary = hidden_sibling(path, "tmp")
    try:
        with create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes the whole content of a file; a reader sees the old one or the new, never half (`replace_file`)."""
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Gives an empty directory to write into, which replaces `directory` when the block has ended, and not before.

    A reader sees the old contents or the new ones, or, for the moment between two renames, none. A process that is
    killed in that moment leaves both beside `directory`, as `.<name>.<random digits>.old` and `.tmp`. Where anything
    fails, the old contents stay.

    Args:
        directory: what is replaced, or where there is nothing yet.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = hidden_sibling(directory, "tmp")
    old = hidden_sibling(directory, "old")
    scratch.mkdir()
    try:
        yield scratch
        if os.path.lexists(directory):
            os.replace(directory, old)
        os.replace(scratch, directory)
        sync(directory.parent)
    finally:
        if os.path.lexists(old) and not os.path.lexists(directory):
            os.replace(old, directory)
        with contextlib.suppress(OSError):  # what cannot be removed now is hidden, and the caller may remove it later
            remove(scratch)
            remove(old)


def sync(path: Path) -> None:
    """Waits until the disk holds what was written to a file, or the names in a directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a directory, on Windows
    try:
        with contextlib.suppress(OSError):  # file systems that cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link (and not what it points to) or a whole directory; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, max_bytes: float = math.inf) -> str:
    """The content of a text file.

    Args:
        path: of the file.
        max_bytes: the largest size that is read.

    Raises:
        RunFileError: for a file that does not exist, cannot be read, is too large, or is no UTF-8.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise RunFileError(f"`{path}` must have at most {max_bytes:,} bytes, got {path.stat().st_size:,}.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunFileError(f"`{path}` must be UTF-8 text, and is not: {error.reason} at byte {error.start}.") from error
    except FileNotFoundError as error:
        raise RunFileError(f"`{path}` must be a file, and there is none.") from error
    except OSError as error:
        raise RunFileError(f"`{path}` cannot be read: {error.strerror}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RunFileError: as `read_text`, and for one that holds anything else.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"`{path}` must be JSON, and is damaged: {error}.") from error
    if not isinstance(value, dict):
        raise RunFileError(f"`{path}` must hold a JSON object, got {type(value).__name__}.")
    return value
