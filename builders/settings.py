"""The settings of a build, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builders.model_card import is_card
from lmgym.errors import InvalidArgumentError, check_bool, check_choice, check_int, check_number
from lmgym.tasks import arithmetic, reviews, stored

TASKS = ("arithmetic", "proxy", "reviews")
ARTEFACTS = Path(stored.ARTEFACTS)
# Settings that are lists, with one value for each model of the build.
LISTS = {"arithmetic": ("digits", "epochs", "batch_size"), "proxy": ("prompts",)}


def check_settings(settings: dict[str, Any]) -> None:
    """Raises `LmGymError` for the first setting that cannot work."""
    check_choice("task", settings["task"], TASKS)
    check_int("seed", settings["seed"], 0)
    check_int("threads", settings["threads"], 1)
    check_bool("progress", settings["progress"])
    output = output_directory(settings)
    if output.exists() and not is_build(output, settings["task"]):  # it will be replaced as a whole
        raise InvalidArgumentError(
            f"`output` must be a new directory or one that was built before, got {str(output)!r}."
        )
    for section in ("reference", "reward"):
        if section in settings:
            _check_section(section, settings[section], LISTS.get(settings["task"], ()))
    if settings["task"] == "reviews":
        min_positions = reviews.MAX_PROMPT_TOKENS + reviews.MAX_NEW_TOKENS
        check_int("reference.positions", settings["reference"]["positions"], min_positions)
    if settings["task"] == "arithmetic":
        _check_sums(settings["reference"])


def _check_section(section: str, values: dict[str, Any], lists: Sequence[str]) -> None:
    """Checks the numbers of a model, or of several models where a name is one of `lists`."""
    for name, given in values.items():
        if name in lists and (not isinstance(given, list) or not given):
            raise InvalidArgumentError(f"`{section}.{name}` must be a list with one value a model, got {given!r}.")
        for value in given if name in lists else [given]:
            if name in ("learning_rate", "temperature"):
                check_number(f"{section}.{name}", value, 0, open_low=True)
            else:
                needs_two = section == "reward" and name in ("ranked", "samples")
                check_int(f"{section}.{name}", value, 2 if needs_two else 1)
    if "heads" in values and values["width"] % values["heads"]:
        raise InvalidArgumentError(
            f"`reference.heads` must divide `reference.width` ({values['width']}), got {values['heads']}."
        )


def _check_sums(reference: dict[str, Any]) -> None:
    """Checks what only the references of `arithmetic` have: one for each size of numbers."""
    for digits in reference["digits"]:
        if digits not in arithmetic.SETTINGS:
            raise InvalidArgumentError(
                f"`reference.digits` must be of {list(arithmetic.SETTINGS)}, got {reference['digits']}."
            )
        min_positions = arithmetic.max_prompt_tokens(digits) + arithmetic.max_new_tokens(digits)
        check_int("reference.positions", reference["positions"], min_positions)
    for name in ("epochs", "batch_size"):
        if len(reference[name]) != len(reference["digits"]):
            raise InvalidArgumentError(
                f"`reference.{name}` must have one value for each of `reference.digits` ({reference['digits']}), "
                f"got {reference[name]}."
            )


def output_directory(settings: dict[str, Any]) -> Path:
    """The directory that the build replaces."""
    return Path(settings["output"] or ARTEFACTS / settings["task"]).absolute()


def is_build(directory: Path, task: str) -> bool:
    """Whether the directory holds artefacts of the task, by its card."""
    readme = directory / "README.md"
    return readme.is_file() and is_card(readme.read_text(encoding="utf-8"), task)
