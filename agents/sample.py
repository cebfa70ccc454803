"""Samples completions for people to judge: `python -m agents.sample task=reviews samples=4 prompts=200`.

A line of the file is a prompt with the completions that one or more policies wrote, each with its log-prob
(`lmgym.feedback.records.Record`). `python -m lmgym.feedback serve` shows them to people, and `simulate` has simulated
ones judge them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from agents.runs.command_line import ending_in_a_line, run_command
from agents.runs.completions import Request, check_sampler, load_writers, write_completions
from agents.runs.config import CONF
from agents.runs.help_page import sample_help_page
from agents.runs.sweeps import is_given
from agents.runs.trust import trusted_modules
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.files import write_records
from lmgym.feedback.records import Record
from lmgym.rewards.members import is_ensemble


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sample")
def main(cfg: DictConfig) -> None:
    """Loads the policies, samples, and writes the file whole, or not at all."""
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    with ending_in_a_line():
        check_sampler(values, is_given("sampler", HydraConfig.get()))
        sample(values)


def sample(values: dict[str, Any]) -> None:
    """Does what `conf/sample.yaml` and the command line say.

    Raises:
        LmGymError: for what cannot be, before anything loads.
    """
    from tqdm import tqdm

    out = Path(values.pop("out"))
    trusted = trusted_modules(values.pop("trust"))
    ensemble = values.pop("disagreement")
    if out.exists():
        raise InvalidArgumentError(f"`out` must be a file that is not there yet, and {str(out)!r} is.")
    if isinstance(values["policies"], str):
        values["policies"] = [values["policies"]]
    if ensemble is not None and not is_ensemble(ensemble):
        raise InvalidArgumentError(
            f"`disagreement` must be a directory of several reward models, such as runs/.../reward of "
            f"`python -m agents.reward reward.ensemble=3`, got {ensemble!r}."
        )
    request = Request(**values)
    writers = load_writers(request, trusted)
    count = min(request.prompts or len(writers[0].envs.engine.prompts), len(writers[0].envs.engine.prompts))
    with tqdm(total=count * request.samples * len(writers), unit="completion", leave=False) as bar:
        records = write_completions(request, writers, bar.update)
        if ensemble is not None:
            records = with_disagreement(records, ensemble, request.device)
        written = write_records(out, records)
    left_out = f" {count - written:,} prompts got the same text each time, and are left out." if written < count else ""
    print(f"{out}: {written:,} prompts with up to {request.samples * len(writers)} completions each.{left_out}")


def with_disagreement(records: Iterator[Record], ensemble: str, device: str) -> Iterator[Record]:
    """The records with a column of how far some reward models disagree about each."""
    from lmgym.reward_models.disagreement import add_disagreement
    from lmgym.rewards.ensemble import load_ensemble

    return add_disagreement(records, load_ensemble(ensemble, device))


if __name__ == "__main__":
    run_command(main, help_page=lambda: sample_help_page(CONF))
