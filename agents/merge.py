"""Writes an adapter as a whole model: `python -m agents.merge model=runs/<the run>/checkpoint out=merged`.

The directory loads with `AutoModelForCausalLM.from_pretrained`, and has the policy's distribution.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from omegaconf import DictConfig

from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.config import CONF
from agents.runs.help_page import merge_help_page
from lmgym.errors import InvalidArgumentError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="merge")
def main(cfg: DictConfig) -> None:
    """Hydra's entry: merges, writes, and prints where."""
    with ending_in_a_line():
        if cfg.model is None or cfg.out is None:
            raise InvalidArgumentError("`model` and `out` must be given: an adapter's directory, and a new one.")
        from lmgym.models.merging import save_merged

        save_merged(cfg.model, cfg.out, cfg.dtype)
        print(f"{cfg.out}: a whole model in {cfg.dtype}")


if __name__ == "__main__":
    run_command(main, help_page=lambda: merge_help_page(CONF))
