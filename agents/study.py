"""Answers a question of RLHF where the optimum is known: `python -m agents.study question=kl-estimator`.

It measures what the question's protocol says (`studies/`), judges by the rule that is fixed there, and writes data,
figures and page into `docs/questions/`.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from omegaconf import DictConfig, OmegaConf

from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.config import CONF
from agents.runs.help_page import study_help_page


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="study")
def main(cfg: DictConfig) -> None:
    """Hydra's entry: measures, judges, writes, and prints the verdict."""
    from agents.questions.run import answer_question

    with ending_in_a_line():
        seeds = OmegaConf.to_container(cfg.seeds) if OmegaConf.is_list(cfg.seeds) else cfg.seeds
        print(answer_question(cfg.question, seeds, cfg.output, redraw=cfg.redraw))


if __name__ == "__main__":
    run_command(main, help_page=lambda: study_help_page(CONF))
