"""A process that is killed before one of its file operations, played in this process."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from typing import Any

import pytest

_OPERATIONS = [(os, name) for name in ("open", "mkdir", "replace", "rename", "fsync", "unlink", "rmdir", "ftruncate")]
_OPERATIONS += [(io, "open"), (builtins, "open")]


class Killed(BaseException):
    """The process is gone: none of its clean-up runs either."""


def survives(function: Callable[[], object], operation: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Calls a function that does no file operation from its nth on; whether it came to its end."""
    count = 0

    def dying(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= operation:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in _OPERATIONS:
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            function()
        except Killed:
            return False
    return True
