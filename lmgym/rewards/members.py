"""Directories with several reward models: an `ensemble.json` names the members and which of their scores is paid.

Read without loading torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.files import read_json
from lmgym.models.names import check_model_name

ENSEMBLE_FILE = "ensemble.json"
SCORES = ("mean", "minimum", "spread")


class Members(NamedTuple):
    """The directories of the members, and which of their scores is paid: one of `SCORES`."""

    directories: list[str]
    score: str


def is_ensemble(name: object) -> bool:
    """Whether a name is that of a directory with several reward models."""
    return isinstance(name, (str, os.PathLike)) and (Path(name) / ENSEMBLE_FILE).is_file()


def read_members(name: str | os.PathLike[str]) -> Members:
    """What the `ensemble.json` of a directory says.

    Raises:
        LmGymError: naming the file, where it is damaged, and a member that is not there.
    """
    path = Path(name) / ENSEMBLE_FILE
    content = read_json(path)
    members = content.get("members")
    if not isinstance(members, list) or len(members) < 2 or not all(isinstance(x, str) for x in members):
        raise InvalidArgumentError(f"`members` in {path} must be a list of two directories at least, got {members!r}.")
    score = content.get("score", SCORES[0])
    check_choice(f"score in {path}", score, SCORES)
    directories = [os.path.normpath(os.path.join(name, member)) for member in members]
    for directory in directories:
        if not os.path.isdir(directory):
            raise InvalidArgumentError(f"`members` in {path} must be directories, and there is none at {directory!r}.")
        check_model_name("reward", directory)
    return Members(directories, score)
