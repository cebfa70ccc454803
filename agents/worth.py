"""Measures what labels are worth: `python -m agents.worth task=reviews labels=0,50,200,1000,5000`.

For each number of labels and each seed: the reference writes completions, simulated annotators judge them, a reward
model learns from that, and a policy is trained against it. Both are then graded by the hidden score that the annotators
felt. A run directory holds `worth.json`, `worth.png` and a file for every part that is finished (`cells/`). Ctrl-C
leaves those, and `resume=<run directory>` goes on with the rest.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word, until there is something to take back

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.config import CONF
from agents.runs.defaults import complete_agents
from agents.runs.help_page import worth_help_page
from agents.runs.sweeps import given, output_directory, register
from agents.runs.trust import trusted_modules
from agents.runs.worth_plan import with_lists
from agents.runs.worth_run import begin_worth, go_on_with_worth

register()
complete_agents()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="worth")
def main(cfg: DictConfig) -> None:
    """Hydra's entry: checks, then measures."""
    with ending_in_a_line(cfg.resume):
        if cfg.resume is not None:
            code = go_on_with_worth(Path(cfg.resume), given(HydraConfig.get()), trusted_modules(cfg.trust))
        else:
            code = begin_worth(cfg, Path(output_directory(HydraConfig.get())))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.argv[1:] = with_lists(sys.argv[1:])
    groups = ("task", "agent", "reward", "sampler")
    run_command(main, path_key="resume", groups=groups, help_page=lambda: worth_help_page(CONF))
