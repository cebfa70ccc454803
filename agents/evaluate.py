"""Grades a finished (or interrupted) run again, to the same table: `python -m agents.evaluate run=<run directory>`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from omegaconf import DictConfig

from agents.runs.command_line import run_command
from agents.runs.config import CONF
from agents.runs.help_page import evaluate_help_page
from agents.runs.regrade import regrade
from agents.runs.signals import Stoppable
from agents.runs.surroundings import prepare_process
from agents.runs.trust import trusted_modules
from lmgym.errors import InvalidArgumentError, LmGymError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Loads a run's checkpoint, grades it and its reference, prints the table, and returns J."""
    prepare_process()
    try:
        with Stoppable():
            if cfg.run is None:
                raise InvalidArgumentError("`run` must be a run directory: python -m agents.evaluate run=<directory>.")
            return regrade(Path(cfg.run), cfg.evaluation, trusted_modules(cfg.get("trust")))
    except KeyboardInterrupt:
        sys.exit(130)
    except LmGymError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(evaluate_help_page())
    else:
        run_command(main, path_key="run")
