"""A protocol in a file: `protocol=my_study.yaml`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from agents.runs.trust import read_config
from lmgym.errors import InvalidArgumentError

_NOT_IN_A_FILE = ("protocol",)


def read_protocol(path: Path) -> tuple[tuple[str, str], dict[str, str]]:
    """The path and SHA-256 of a protocol, and its keys with values as on a command line.

    Raises:
        LmGymError: for a file that is none.
    """
    values = read_config(path)
    for key in _NOT_IN_A_FILE:
        if key in values:
            raise InvalidArgumentError(f"`{key}` must not stand in {path} itself.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return (str(path), digest), {key: _as_argument(key, value) for key, value in _leaves(values)}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _as_argument(key: str, value: Any) -> str:
    """A list stands for several values."""
    if isinstance(value, list):
        if any(isinstance(part, list | Mapping) for part in value):
            raise InvalidArgumentError(f"`{key}` must be a value or a list of values, got {value}.")
        return ",".join(_as_argument(key, part) for part in value)
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value).partition("\n")[0]
