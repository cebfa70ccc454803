"""What a run depends on besides its checkpoint: its config, and the files that the config names.

Both are noted in every checkpoint, and compared with what is there when a run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agents.faults.config import KNOBS
from lmgym.files import RunFileError, checksum
from lmgym.rewards.members import is_ensemble, read_members

# The other parts may change, or are of the machine. The last three are of a reward model's training.
COMPARED = ("task", "env", "agent", "sampler", "seed", *KNOBS, "model", "preferences", "reward")
_DATA_SETS = ("env.prompts",)  # which may be directories with the files in folders of their own
_DIRECTORIES = ("env.model", "env.reward", "model", *_DATA_SETS)  # which may be directories
_PATHS = (*_DIRECTORIES, "preferences")  # where a bare word may be a path


def notes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint notes of a run: the parts of its config that stay, and a SHA-256 of each file named there.

    Args:
        config: plain values.

    Raises:
        RunFileError: for a file that cannot be read.
    """
    values = {name: config[name] for name in COMPARED if name in config}
    inputs = {}
    for key, value in _leaves(values):
        path = _file_of(key, value)
        if path is not None:
            inputs[key] = _checksum(key, path)
    return json.loads(json.dumps({"config": values, "inputs": inputs}))


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as a checkpoint noted it, a sentence each.

    Args:
        then: as `notes_of` gave it. now: the same of today.
    """
    found = []
    before, after = (dict(_leaves(notes.get("config", {}))) for notes in (then, now))
    for key in sorted(before.keys() | after.keys()):
        old, new = (repr(x[key]) if key in x else "missing" for x in (before, after))
        if old != new:
            found.append(f"`{key}` in config.yaml is {new}, and was {old} when the checkpoint was saved.")
    for key, digest in then.get("inputs", {}).items():
        if key in after and after.get(key) == before.get(key) and now["inputs"].get(key) != digest:
            found.append(f"`{key}`: the content of {after[key]} is no longer that of when the run began.")
    return found


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and lists, by dotted key."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list) and values:
        for i, value in enumerate(values):
            yield from _leaves(value, f"{key}.{i}")
    else:
        yield key, values


def _file_of(key: str, value: Any) -> Path | None:
    """The file or directory that a value of a config names, or None. Elsewhere a bare word is a choice, and no path."""
    if not isinstance(value, str) or key.endswith("_target_"):
        return None
    whole = re.sub(r"\.\d+$", "", key)  # of a list, such as that of several rewards
    if whole not in _PATHS and not {"/", ".", os.sep} & set(value):
        return None
    try:
        path = Path(value)
        return path if path.is_file() or (whole in _DIRECTORIES and path.is_dir()) else None
    except (OSError, ValueError):  # too long, or with a null byte: a prompt, for one
        return None


def _checksum(key: str, path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a directory and in those of its members."""
    try:
        if path.is_file():
            return checksum(path)
        directories = [path, *map(Path, read_members(path).directories)] if is_ensemble(path) else [path]
        pattern = "**/*" if key in _DATA_SETS else "*"
        inside = (sorted(directory.glob(pattern)) for directory in directories)
        files = [x for several in inside for x in several if x.is_file() and not x.name.startswith(".")]
        return hashlib.sha256(json.dumps([(x.name, checksum(x)) for x in files]).encode()).hexdigest()
    except OSError as error:
        raise RunFileError(f"`{key}`: {error.filename or path} cannot be read: {error.strerror}.") from error
