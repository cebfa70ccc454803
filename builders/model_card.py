"""The card of a build, README.md beside the models: what was done and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

TEMPLATES = Path(__file__).parents[1] / "conf" / "build_task" / "card"


def write_card(settings: dict[str, Any], facts: dict[str, Any]) -> str:
    """The text of the card.

    Args:
        settings: of the build.
        facts: what was measured, by the names in the template `conf/build_task/card/<task>.md`.
    """
    shown = {"task": settings["task"]} | {n: value for n, value in settings.items() if n not in ("output", "progress")}
    numbers = {**settings.get("reference", {}), **settings.get("reward", {}), **facts}
    template = (TEMPLATES / f"{settings['task']}.md").read_text(encoding="utf-8")
    return template.format(
        **numbers,
        task=settings["task"],
        threads=settings["threads"],
        settings=OmegaConf.to_yaml(OmegaConf.create(shown)).strip(),
    )


def is_card(text: str, task: str) -> bool:
    """Whether a text is the card of a build of the task."""
    return text.startswith(f"# Artefacts of the task `{task}`\n")


def join_columns(names: Sequence[str], measured: Sequence[dict[str, float]]) -> dict[str, str]:
    """The facts of several models as the cells of one table, a column a model.

    Args:
        names: of the models.
        measured: the numbers of each, by name.

    Returns:
        For each number its row of the table; under "names" the head of the table, and under "rule" the line below it.
    """
    rows = {name: " | ".join(_format_number(facts[name]) for facts in measured) for name in measured[0]}
    return {**rows, "names": " | ".join(f"`{name}`" for name in names), "rule": "|".join("---" for _ in names)}


def _format_number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
