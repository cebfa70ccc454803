"""Grades a finished (or interrupted) run again, to the same table: `python -m agents.evaluate run=<run directory>`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from agents.command_line import run_command
from agents.report import table, write_json
from agents.surroundings import prepare_process
from agents.train import CONF, build, check, check_checkpoint, grade, saved_config, summarise
from agents.trust import trusted_modules
from lmgym.errors import InvalidArgumentError, LmGymError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def main(cfg: DictConfig) -> float:
    """Loads a run's checkpoint, grades it and its reference, prints the table, and returns J."""
    prepare_process()
    from lmgym.models.policy import CausalPolicy

    try:
        if cfg.run is None:
            raise InvalidArgumentError("`run` must be a run directory: python -m agents.evaluate run=<directory>.")
        directory = Path(cfg.run)
        saved = saved_config(directory, trusted_modules(cfg.get("trust")))
        saved["evaluation"] |= {name: value for name, value in cfg.evaluation.items() if value is not None}
        plan = check(saved)
        check_checkpoint(directory)
        agent = build(plan)
        agent.load(directory / "checkpoint")
        seconds = float((directory / "train_seconds.txt").read_text())
        before, after = grade(plan, CausalPolicy(agent.envs.engine.lm)), grade(plan, agent)
        summary = summarise(plan, before, after, seconds, agent)
    except LmGymError as error:
        sys.exit(f"{error}")
    write_json(directory / "evaluation.json", summary)
    print(table(summary))
    recorded = directory / "summary.json"
    if recorded.is_file():
        same = json.loads(recorded.read_text())["after"]["return"]["mean"]
        print(f"\nrecorded when it was trained: J = {same:.4f}; now: J = {summary['after']['return']['mean']:.4f}")
    return float(summary["after"]["return"]["mean"])


if __name__ == "__main__":
    run_command(main)
