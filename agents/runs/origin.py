"""Where the numbers of a run come from: the command, the commit and the machine."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ORIGIN = "origin.json"
_WORKERS = ("multiprocessing", "loky", "joblib")  # in the command of a process that another one has started


def find_origin() -> dict[str, Any]:
    """What `origin.json` holds: `command`, `commit` and `machine`; None for what cannot be found out."""
    return {"command": find_command(), "commit": find_commit(), "machine": find_machine()}


def find_command() -> str | None:
    """The command of this process; None in one that another has started to share its work."""
    arguments = sys.orig_argv[1:]
    if any(word in argument for argument in arguments for word in _WORKERS):
        return None
    return shlex.join(["python", *arguments])


@functools.cache
def find_commit() -> str | None:
    """The commit of the checkout, with "+" where its files are not those of the commit."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


@functools.cache
def find_machine() -> dict[str, Any]:
    """Its processor, cores, memory and operating system, and its GPU where torch is loaded and sees one."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _read_after("/proc/cpuinfo", "model name") or platform.processor() or None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _read_after("/proc/meminfo", "MemTotal"),
        "gpu": None,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _read_after(path: str, key: str) -> str | None:
    """What a line `key: value` of a file of Linux says, or None."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                name, colon, value = line.partition(":")
                if colon and name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return None
