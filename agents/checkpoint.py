"""What every agent's checkpoint has in common: it is written whole and checked when read.

A checkpoint is a directory. Beside the agent's own files it has `manifest.json`: the SHA-256 of each of them, a serial
number, and notes of whoever saved it. Checked are files that were damaged, edited, or brought from another checkpoint.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmgym.files import RunFileError, checksum, create, read_json, remove, replace_directory, sync

MANIFEST = "manifest.json"
_AGAIN = "Put back the one that was saved, or begin a new run."


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        serial: 1 of the first checkpoint of a directory; each that replaces it has one more.
        files: SHA-256 by path, `/` between its parts.
        notes: JSON values of whoever saved it.
    """

    serial: int
    files: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """An empty directory to write into, which replaces `directory` when the block has ended, and not before.

    A reader sees the old contents or the new, or, for the moment between two renames, none; a process that is killed in
    that moment leaves both beside it, whole: `newest` finds the new one there, and `recover` puts it back. Where
    anything fails, the old ones stay.

    Args:
        directory: that of the checkpoint before, an empty one, or none.
        notes: JSON values that `verify` returns.

    Raises:
        RunFileError: for a directory that holds anything else, which would be lost.
    """
    directory = Path(directory)
    _check_replaceable(directory)
    serial = 1 + _serial(directory)
    with replace_directory(directory) as scratch:
        yield scratch
        _seal(scratch, serial, dict(notes or {}))


def verify(directory: Path) -> Manifest:
    """The manifest of a checkpoint, every file of which is as it was saved.

    Raises:
        RunFileError: naming the first that is not.
    """
    manifest = read_manifest(directory)
    there = _files(directory)
    for name in sorted(manifest.files.keys() - there.keys()):
        raise RunFileError(f"`{directory / name}` is missing from the checkpoint. {_AGAIN}")
    for name in sorted(there.keys() - manifest.files.keys()):
        raise RunFileError(f"`{directory / name}` is no part of the checkpoint that it lies in. Move it away.")
    for name, path in there.items():
        try:
            same = checksum(path) == manifest.files[name]
        except OSError as error:
            raise RunFileError(f"`{path}` cannot be read: {error.strerror}.") from error
        if not same:
            raise RunFileError(f"`{path}` was changed or damaged since the checkpoint was saved. {_AGAIN}")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """What a checkpoint says of itself; its other files are not read.

    Raises:
        RunFileError: for one that is damaged or not there.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise RunFileError(
            f"`{path}` must be a file, and there is none: {directory} is no checkpoint, or one of an older lmgym."
        )
    content = read_json(path)
    said = content.pop("sha256", None)
    expected = {"serial": int, "files": dict, "notes": dict}
    if said != _digest(content) or {name: type(value) for name, value in content.items()} != expected:
        raise RunFileError(f"`{path}` was changed or damaged since the checkpoint was saved. {_AGAIN}")
    return Manifest(**content)


def newest(directory: Path) -> Path | None:
    """Where the last whole checkpoint is: `directory`, or where a kill has left it beside that, or nowhere (None).

    Raises:
        RunFileError: where all that a kill has left is damaged.
    """
    if os.path.lexists(directory):
        return directory
    whole: list[tuple[int, float, Path]] = []
    damaged: list[RunFileError] = []
    for path in _left(directory):
        try:
            whole.append((verify(path).serial, (path / MANIFEST).stat().st_mtime, path))
        except RunFileError as error:
            if path.suffix == ".old":  # an unfinished .tmp is none
                damaged.append(error)
    if not whole and damaged:
        raise damaged[0]
    return max(whole)[2] if whole else None


def recover(directory: Path) -> None:
    """Restores the newest whole checkpoint, and removes what kills have left; no other process may write it.

    Raises:
        RunFileError: as `newest`; then nothing is removed.
    """
    found = newest(directory)
    if found is not None and found != directory:
        os.replace(found, directory)
    for path in (*_left(directory), *_left(directory.with_name(f".{directory.name}"))):  # of a save within a save too
        remove(path)


def _left(directory: Path) -> list[Path]:
    """What `replacing` may have left beside a directory."""
    name = glob.escape(directory.name)
    return [path for end in ("tmp", "old") for path in directory.parent.glob(f".{name}.*.{end}")]


def _check_replaceable(directory: Path) -> None:
    if directory.is_dir() and not (directory / MANIFEST).is_file():
        for path in directory.iterdir():
            raise RunFileError(
                f"`directory` must be a checkpoint, empty, or not there yet, and {directory} holds {path.name}: it "
                "would be lost."
            )
    elif directory.exists() and not directory.is_dir():
        raise RunFileError(f"`directory` must be a directory, got the file {directory}.")


def _serial(directory: Path) -> int:
    """The highest serial number of a checkpoint in a directory or beside it; 0 where there is none."""
    found = [0]
    for path in (directory, *_left(directory)):
        with contextlib.suppress(RunFileError):
            found.append(read_manifest(path).serial)
    return max(found)


def _files(directory: Path) -> dict[str, Path]:
    """Every file of a checkpoint but the manifest and hidden ones, by its path inside."""
    found = {}
    for parent, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent) / name
            if not name.startswith(".") and path != directory / MANIFEST:
                found[path.relative_to(directory).as_posix()] = path
    return found


def _seal(directory: Path, serial: int, notes: dict[str, Any]) -> None:
    """Writes the manifest, last of all, and has the disk hold every file."""
    files = {}
    for name, path in _files(directory).items():
        sync(path)
        files[name] = checksum(path)
    content: dict[str, Any] = json.loads(json.dumps({"serial": serial, "files": files, "notes": notes}))
    remove(directory / MANIFEST)  # of an agent that has saved itself by `replacing` too
    with create(directory / MANIFEST) as file:
        file.write(json.dumps({**content, "sha256": _digest(content)}, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(directory):
        sync(Path(parent))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
