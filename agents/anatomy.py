"""Says where the gap of a run's policy to the optimum comes from: `python -m agents.anatomy run=<run directory>`.

It prints tables, and writes `anatomy.json` and `anatomy.png` into the run directory.
"""

from __future__ import annotations

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from omegaconf import DictConfig

from agents.runs.anatomy import dissect_run
from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.config import CONF
from agents.runs.help_page import anatomy_help_page
from agents.runs.trust import trusted_modules
from lmgym.errors import InvalidArgumentError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="anatomy")
def main(cfg: DictConfig) -> float:
    """Loads a run's checkpoint, takes its gap apart, prints and draws what it finds, and returns V* - J."""
    with ending_in_a_line(cfg.run):
        if cfg.run is None:
            raise InvalidArgumentError("`run` must be a run directory: python -m agents.anatomy run=<directory>.")
        return dissect_run(Path(cfg.run), cfg.evaluation, trusted_modules(cfg.get("trust")))


if __name__ == "__main__":
    run_command(main, path_key="run", help_page=anatomy_help_page)
