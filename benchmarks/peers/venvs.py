"""Environments of other libraries, which no environment of this project needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
TRL = {"ppo": "trl==1.12.0", "rloo": "trl==1.16.0", "grpo": "trl==1.16.0", "sft": "trl==1.16.0"}  # 1.16 has no PPO
TRANSFORMERS = "transformers==5.23.0"  # both releases of TRL take it, and so does this project


def install_commands(python: Path, library: str) -> list[list[str]]:
    """What installs a library; torch goes first and alone, so that no other package chooses its build."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    return [[*pip, TORCH], [*pip, library, TRANSFORMERS]]


def find_python(directory: Path, library: str) -> Path:
    """The Python of an environment that has a library, made where it is missing.

    Args:
        directory: where environments lie, outside the repository. library: with its version, as pip takes it.
    """
    home = directory / library.replace("==", "-")
    python = home / "bin" / "python"
    finished = home / "finished"
    if not finished.exists():
        print(f"Installing {library} into {home}: the first time takes a few minutes.", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        for command in install_commands(python, library):
            subprocess.run(command, check=True)
        finished.touch()
    return python
