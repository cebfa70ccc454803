"""`protocol.yaml` in the directory of a comparison: what was asked for, and by what it was run each time."""

from __future__ import annotations

import datetime
from typing import Any

from agents.comparison.protocol import Request
from agents.runs.origin import find_origin
from agents.runs.run import versions
from agents.runs.trust import config_text, read_config
from lmgym.errors import InvalidArgumentError
from lmgym.files import write_atomically

PROTOCOL = "protocol.yaml"
_HEADER = "# What python -m agents.compare ran here: the protocol, and every call of the command."


def write_protocol(request: Request, command: str) -> None:
    """Notes a call; one that is like the last but for its time is not noted twice.

    Args:
        request: what was asked for. command: the command.

    Raises:
        InvalidArgumentError: for a directory of a protocol in a file that was changed since the first run.
    """
    path = request.out / PROTOCOL
    values: dict[str, Any] = read_config(path) if path.is_file() else {}
    source = None if request.source is None else {"path": request.source[0], "sha256": request.source[1]}
    before = values.get("file")
    if before and source and before["sha256"] != source["sha256"]:
        raise InvalidArgumentError(
            f"`protocol` must be as it was when {request.out} was begun, and {source['path']} has changed: put it "
            "back, or choose another `out`."
        )
    call = {**find_origin(), "command": command, "packages": versions()}
    calls = values.get("calls") or []
    if not calls or {**calls[-1], "time": None} != {**call, "time": None}:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        calls.append({"time": now, **call})
    values = {"protocol": request.protocol.as_values(), "file": source, "calls": calls}
    write_atomically(path, f"{_HEADER}\n{config_text(values)}")
