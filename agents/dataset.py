"""Data sets for offline RL: `python -m agents.dataset task=echo-4 policies=reference,medium,optimal out=minari`.

Every policy answers the prompts of a task, and its episodes become a Minari data set (`lmgym.minari`) whose reference
scores are J of the frozen reference and V*. An offline agent is then graded between a known worst and a known best.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.completions import Request, check_sampler
from agents.runs.config import CONF
from agents.runs.datasets import split_policies, write_datasets
from agents.runs.help_page import dataset_help_page
from agents.runs.sweeps import is_given
from agents.runs.trust import trusted_modules


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="dataset")
def main(cfg: DictConfig) -> None:
    """Loads the policies, samples, and writes each data set whole, or not at all."""
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    with ending_in_a_line():
        check_sampler(values, is_given("sampler", HydraConfig.get()))
        write(values)


def write(values: dict[str, Any]) -> None:
    """Does what `conf/dataset.yaml` and the command line say.

    Raises:
        LmGymError: for what cannot be, before anything loads.
    """
    from tqdm import tqdm

    root = values.pop("out")
    trusted = trusted_modules(values.pop("trust"))
    policies = values.pop("policies")
    others, is_mixed = split_policies([policies] if isinstance(policies, str) else policies)
    request = Request(policies=others, **values)
    with tqdm(unit="episode", leave=False) as bar:

        def start(total: int) -> Callable[[int], object]:
            bar.reset(total)
            return bar.update

        found = write_datasets(request, root, mixed=is_mixed, trusted=trusted, start=start)
    for directory, episodes, steps in found:
        print(f"{directory}: {episodes:,} episodes, {steps:,} steps")


if __name__ == "__main__":
    run_command(main, help_page=lambda: dataset_help_page(CONF))
