"""Trains an agent on a task: `python -m agents.train task=keyword-8 agent=ppo seed=1`.

A run directory holds `config.yaml`, `versions.json`, `origin.json`, `metrics.jsonl`, TensorBoard files, `checkpoint/`
(the actor loads with `AutoModelForCausalLM`), `summary.json`, `samples.json` and `curves.png`. Ctrl-C leaves a
checkpoint, and `resume=<run directory>` goes on from it to the same curve. `seeds=32` trains 32 seeds at once, each in
`seed<k>/`. Started by torchrun or `accelerate launch`, all processes train one run.
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
from agents.runs.help_page import help_page
from agents.runs.launch import check_one_run, launched_rank
from agents.runs.many import begin_many, go_on_with_many, mean_return, seed_directories
from agents.runs.run import begin, go_on
from agents.runs.sweeps import given, output_directory, register
from agents.runs.trust import trusted_modules
from lmgym.files import read_json

register()
complete_agents()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float:
    """Hydra's entry: checks, then trains.

    Returns:
        J of the trained policy, which sweepers such as Optuna's maximise; the mean over seeds where there are several.
    """
    resume = cfg.resume is not None
    directory = Path(cfg.resume if resume else output_directory(HydraConfig.get()))
    with ending_in_a_line(directory, shared=True):
        hydra_config = HydraConfig.get() if HydraConfig.initialized() else None  # none where a program calls this
        overrides = [] if hydra_config is None else given(hydra_config)
        is_multirun = hydra_config is not None and hydra_config.mode == RunMode.MULTIRUN
        check_one_run(cfg.get("seeds", 1), is_multirun=is_multirun)
        if launched_rank():
            from agents.runs.follow import follow  # which loads torch

            follow(cfg, directory if resume else None, overrides, trusted_modules(cfg.get("trust")))
            return 0.0
        if resume:
            proceed = go_on_with_many if seed_directories(directory) else go_on
            code = proceed(directory, overrides, trusted_modules(cfg.get("trust")))
        else:
            code = begin(cfg, directory) if cfg.get("seeds", 1) == 1 else begin_many(cfg, directory)
    if code:
        sys.exit(code)
    if seed_directories(directory):
        return mean_return(directory)
    return float(read_json(directory / "summary.json")["after"]["return"]["mean"])


if __name__ == "__main__":
    from agents.train import main  # under its own name, by which processes of a multirun find what they run

    groups = ("task", "agent", "sampler", "tracker", "experiment")
    run_command(main, path_key="resume", groups=groups, help_page=lambda: help_page(sys.argv[1:]), shared=True)
