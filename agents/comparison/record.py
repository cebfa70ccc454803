"""`protocol.yaml` in the directory of a comparison: what was asked for, and by what it was run each time."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.comparison.protocol import Request
from agents.runs.origin import find_origin
from agents.runs.run import versions
from agents.runs.trust import config_text, read_config
from lmgym.errors import InvalidArgumentError
from lmgym.files import RunFileError, write_atomically

PROTOCOL = "protocol.yaml"
RULE = ("max_seeds", "margin", "seeds")  # by which seeds are added
_HEADER = "# What python -m agents.compare ran here: the protocol, and every call of the command."


def write_protocol(request: Request, command: str) -> None:
    """Notes a call; one that is like the last but for its time is not noted twice.

    Args:
        request: what was asked for. command: the command.

    Raises:
        InvalidArgumentError: for a directory of a protocol in a file that is another one since the first run, or of
            runs that another rule has added.
    """
    path = request.out / PROTOCOL
    values = _read(path)
    source = None if request.source is None else {"path": request.source[0], "sha256": request.source[1]}
    if values:
        _check_file(values, source, request)
        source = values.get("file")
    _check_rule(values.get("protocol") or {}, request)
    call = {**find_origin(), "command": command, "packages": versions()}
    calls = list(values.get("calls") or [])
    if not calls or {**calls[-1], "time": None} != {**call, "time": None}:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        calls.append({"time": now, **call})
    values = {"protocol": request.protocol.as_values(), "file": source, "calls": calls}
    write_atomically(path, f"{_HEADER}\n{config_text(values)}")


def _read(path: Path) -> dict[str, Any]:
    """What was noted before.

    Raises:
        RunFileError: for a file that this command has not written so.
    """
    values = read_config(path) if path.is_file() else {}
    kinds = {"protocol": dict, "file": dict, "calls": list}
    whole = all(isinstance(values.get(name) or kind(), kind) for name, kind in kinds.items())
    if not whole or not all(isinstance(call, dict) for call in values.get("calls") or []):
        raise RunFileError(f"`{path}` must be as this command wrote it, and is not.")
    return values


def _check_file(values: Mapping[str, Any], source: Mapping[str, str] | None, request: Request) -> None:
    """Raises `InvalidArgumentError` where the file that a directory was begun with is not the one that is given now."""
    before = values.get("file") or {}
    if source is None and before and values.get("protocol") != request.protocol.as_values():
        raise InvalidArgumentError(
            f"`protocol` must be given, for {request.out} was begun with {before.get('path')}: choose another `out`."
        )
    if source is not None and not before:
        raise InvalidArgumentError(
            f"`protocol` must be there before the first run, and {request.out} was begun without: choose another `out`."
        )
    if source is not None and before.get("sha256") != source["sha256"]:
        raise InvalidArgumentError(
            f"`protocol` must be as it was when {request.out} was begun, and {source['path']} has changed: put it "
            "back, or choose another `out`."
        )


def _check_rule(before: Mapping[str, Any], request: Request) -> None:
    """Raises `InvalidArgumentError` where seeds are added by another rule than when the directory was begun."""
    now = request.protocol.as_values()
    rules = [{name: values.get(name) for name in RULE} for values in (before, now)]
    adds = any(rule["max_seeds"] is not None for rule in rules)
    if before and adds and rules[0] != rules[1]:
        raise InvalidArgumentError(
            f"`max_seeds`, `margin` and `seeds` must be as they were when {request.out} was begun, because its runs "
            "have been looked at: choose another `out`."
        )
