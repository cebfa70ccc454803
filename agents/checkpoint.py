"""What every agent's checkpoint has in common: it is written whole, and it counts what the run has cost."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmgym.episodes import Episodes


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty directory to write into, which takes the place of `directory` when the block has ended, and not before.

    A reader sees the old contents or the new, or, for the moment between two renames, none; a process that is killed in
    that moment leaves both beside it, and `recover` puts the old back. Where anything fails, the old ones stay.
    """
    directory = Path(directory)
    scratch, old = (directory.with_name(f".{directory.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if directory.exists():
            os.replace(directory, old)
        os.replace(scratch, directory)
    finally:
        recover(directory)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def recover(directory: Path) -> None:
    """Puts back the old contents of a directory that `replacing` was about to replace when it was stopped."""
    for old in sorted(directory.parent.glob(f".{glob.escape(directory.name)}.*.old")):
        if not directory.exists():
            os.replace(old, directory)


@dataclass
class TokenCount:
    """Tokens that an agent's policy has read, prompts included: what a run costs on any machine.

    A token counts each time a pass goes over it; columns of padding do not count. A critic with a trunk of its own, the
    frozen reference inside a residual, and the mask policy of NLPO go along with their policy and are not counted
    again. Nor is what the env reads to pay the agent (reference and reward model), which is the same for every agent at
    equal env steps.

    Attributes:
        forward: in decoding, in updates, and where an update reads the reference itself.
        backward: in passes that take a gradient, once a gradient.
    """

    forward: int = 0
    backward: int = 0

    def read(self, episodes: Episodes, *, forward: int = 1, backward: int = 0) -> None:
        """Counts so many passes over every token of some episodes."""
        size = episodes.num_prompt_tokens + episodes.num_tokens
        self.forward += forward * size
        self.backward += backward * size

    def metrics(self) -> dict[str, float]:
        """The sums so far, as metrics of a run."""
        return {"cost/forward_tokens": self.forward, "cost/backward_tokens": self.backward}
