"""Grades a finished (or interrupted) run again, to the same table: `python -m agents.evaluate run=<run directory>`."""

from __future__ import annotations

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from omegaconf import DictConfig

from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.config import CONF
from agents.runs.help_page import evaluate_help_page
from agents.runs.regrade import regrade
from agents.runs.trust import trusted_modules
from lmgym.errors import InvalidArgumentError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Loads a run's checkpoint, grades it and its reference, prints the table, and returns J."""
    with ending_in_a_line(cfg.run):
        if cfg.run is None:
            raise InvalidArgumentError("`run` must be a run directory: python -m agents.evaluate run=<directory>.")
        return regrade(Path(cfg.run), cfg.evaluation, trusted_modules(cfg.get("trust")))


if __name__ == "__main__":
    run_command(main, path_key="run", help_page=evaluate_help_page)
