"""Builds the artefacts of a built-in task: `python -m builders.build task=reviews`.

A pipeline a file: builders/reviews.py, builders/arithmetic.py and builders/proxy.py. The settings are those of
`conf/build_task/build.yaml` and of `conf/build_task/task/<task>.yaml`.

A build replaces the directory of artefacts as a whole. Stored optima in it are removed with the models that they were
derived from: `python -m builders.optima --write <task>` derives them again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from agents.runs.command_line import run_command
from builders.model_card import write_card
from builders.settings import check_settings, output_directory
from lmgym.errors import LmGymError
from lmgym.files import replace_directory

if TYPE_CHECKING:
    from builders.models import Built

# torch and the pipelines are imported where they are used, so that a wrong setting is reported at once.


@hydra.main(version_base="1.3", config_path="../conf/build_task", config_name="build")
def main(config: DictConfig) -> None:
    """Checks the settings, builds, and prints the card."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    try:
        check_settings(settings)
    except LmGymError as error:
        raise SystemExit(str(error)) from None
    import torch

    torch.set_num_threads(settings["threads"])
    output = build(settings)
    print((output / "README.md").read_text(encoding="utf-8"))
    print(f"Written to {output}")


def build(settings: dict[str, Any]) -> Path:
    """Builds the artefacts of a task and returns the directory that they are in."""
    started = time.monotonic()
    models, facts = build_models(settings)
    facts["seconds"] = time.monotonic() - started
    output = output_directory(settings)
    with replace_directory(output) as scratch:
        for name, (model, tokenizer) in models.items():
            model.save_pretrained(scratch / name)
            tokenizer.save_pretrained(scratch / name)
        for file in scratch.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes for the owner alone
        facts["megabytes"] = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file()) / 1e6
        (scratch / "README.md").write_text(write_card(settings, facts), encoding="utf-8")
    return output


def build_models(settings: dict[str, Any]) -> Built:
    """Runs the pipeline of a task: its models, and what was measured."""
    if settings["task"] == "reviews":
        from builders.reviews import build_reviews

        return build_reviews(settings)
    if settings["task"] == "arithmetic":
        from builders.arithmetic import build_arithmetic

        return build_arithmetic(settings)
    from builders.proxy import build_proxy

    return build_proxy(settings)


if __name__ == "__main__":
    run_command(main, configs=Path(__file__).parents[1] / "conf" / "build_task")
