"""What the commands about a run that exists have in common: `agents.evaluate` and `agents.anatomy`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from agents.runs.command_line import ending_in_a_line
from agents.runs.config import CONF
from agents.runs.trust import trusted_modules
from lmgym.errors import InvalidArgumentError


def command_of_a_run(name: str, do: Callable[[Path, Any, Sequence[str]], float]) -> Callable[[], Any]:
    """A Hydra main of `run=<run directory>`.

    Args:
        name: of the command, and of its config.
        do: what it does of a run directory, with `evaluation` of the config and the modules that are trusted; returns
            the number that a sweeper is to maximise.
    """

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def main(cfg: DictConfig) -> float:
        with ending_in_a_line(cfg.run):
            if cfg.run is None:
                raise InvalidArgumentError(f"`run` must be a run directory: python -m agents.{name} run=<directory>.")
            return do(Path(cfg.run), cfg.evaluation, trusted_modules(cfg.get("trust")))

    return main
