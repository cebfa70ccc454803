"""Trains a reward model on feedback: `python -m agents.reward task=reviews preferences=prefs.jsonl`.

A run directory holds `reward/`, which `env.reward=` takes, with a model card; `summary.json`, `reward.png` with the
calibration, `predictions.jsonl` with the held-out scores, and what every run has (`agents.train`). Ctrl-C leaves a
checkpoint, and `resume=<run directory>` goes on from it. Started by torchrun or `accelerate launch`, all processes
train one model.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word, until there is something to take back

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.config import CONF
from agents.runs.defaults import complete_agents
from agents.runs.help_page import reward_help_page
from agents.runs.launch import check_one_run, launched_rank
from agents.runs.reward_run import begin_reward, go_on_with_reward
from agents.runs.sweeps import given, output_directory, register

register()
complete_agents()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="reward")
def main(cfg: DictConfig) -> None:
    """Hydra's entry: checks, then trains."""
    with ending_in_a_line(cfg.resume, shared=True):
        check_one_run(1, is_multirun=HydraConfig.get().mode == RunMode.MULTIRUN)
        resume = None if cfg.resume is None else Path(cfg.resume)
        if launched_rank():
            from agents.runs.follow import follow_reward  # which loads torch

            follow_reward(cfg, resume)
            return
        if resume is not None:
            code = go_on_with_reward(resume, given(HydraConfig.get()))
        else:
            code = begin_reward(cfg, Path(output_directory(HydraConfig.get())))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    from agents.reward import main  # under its own name, by which processes of a multirun find what they run

    groups = ("task", "reward")
    run_command(main, path_key="resume", groups=groups, help_page=lambda: reward_help_page(CONF), shared=True)
