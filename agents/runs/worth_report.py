"""What `python -m agents.worth` says: `worth.json`, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.runs.report import write_json
from agents.runs.sweeps import aligned
from agents.runs.worth_plan import PICTURE, RANDOM, RESULT, WorthPlan
from lmgym.intervals import Interval

if TYPE_CHECKING:
    from lmgym.tasks import StoredOptimum

Rows = Sequence[Mapping[str, Any]]
Numbers = dict[str, float | None]
_COLUMNS = {
    "reward_people": "agrees with people",
    "reward_reference": "with gold: reference",
    "reward_policy": "with gold: policy",
    "return": "gold return",
    "share": "share of the gain",
    "kl": "KL (nats)",
}


def write_worth(plan: WorthPlan, directory: Path, cells: Rows) -> None:
    """Writes `worth.json` and the picture, and prints the table.

    Args:
        plan: of the run. directory: of the run. cells: contents of their files, all of the plan's.
    """
    from agents.runs.worth_picture import draw_worth

    result = summarise(plan, cells)
    write_json(directory / RESULT, result)
    draw_worth(result, directory / PICTURE)
    print(f"\n{worth_table(result)}\n\n{directory / PICTURE}")


def cell_line(cell: Mapping[str, Any], number: int, total: int) -> str:
    """What is printed when a cell is finished."""
    last = cell["rounds"][-1]
    labels = "the hidden score itself" if cell["labels"] is None else f"{cell['labels']:,} labels"
    if cell["choice"] != RANDOM:
        labels += f" by {cell['choice']}"
    reward = last.get("reward", {}).get("reference")
    accuracy = "" if reward is None else f"reward {100 * reward:.1f} %, "
    numbers = f"{accuracy}gold return {last['return']['mean']:.3f}"
    return f"{number}/{total}  seed {cell['seed']}, {labels}: {numbers}; {cell['seconds']:.0f} s"


# -- the numbers -----------------------------------------------------------------------------------------------------


def summarise(plan: WorthPlan, cells: Rows) -> dict[str, Any]:
    """`worth.json`: what is known of V*, a row for each number of labels, choice and round, and all the cells.

    `differences` has what choosing by disagreement changes, seed by seed, where both choices were measured.
    """
    optimum = find_optimum(plan, cells)
    gain = None if optimum is None else optimum["value"] - optimum["reference"]
    groups: dict[tuple[int | None, str, int], list[Numbers]] = {}
    for cell in cells:
        for row in cell["rounds"]:
            numbers = _numbers(row)
            if optimum is not None and gain and "return" in row:
                numbers["share"] = (row["return"]["mean"] - optimum["reference"]) / gain
            groups.setdefault((cell["labels"], cell["choice"], row["round"]), []).append(numbers)
    rows = []
    for (labels, choice, number), found in groups.items():
        means = {name: _over_seeds([numbers.get(name) for numbers in found]) for name in _COLUMNS}
        rows.append({"labels": labels, "choice": choice, "round": number, "seeds": len(found), **means})
    return {
        "task": str(plan.training.settings["task"]),
        "agent": plan.training.agent_class.__name__,
        "total_timesteps": plan.training.total_timesteps,
        "seeds": list(plan.seeds),
        "rounds": plan.rounds,
        "choices": list(plan.choices),
        "writer": plan.writer,
        "optimum": optimum,
        "rows": rows,
        "differences": find_differences(groups),
        "cells": list(cells),
        "seconds": sum(cell["seconds"] for cell in cells),
    }


def find_differences(groups: Mapping[tuple[int | None, str, int], Sequence[Numbers]]) -> list[dict[str, Any]]:
    """What the numbers under disagreement are above those at random, in pairs of one seed, with Student's interval.

    Args:
        groups: the numbers of each seed, by labels, choice and round.
    """
    rows = []
    for (labels, choice, number), found in groups.items():
        if choice == RANDOM:
            continue
        paired = groups.get((labels, RANDOM, number), [])
        if len(paired) != len(found):
            continue
        row: dict[str, Any] = {"labels": labels, "round": number}
        for name in _COLUMNS:
            pairs = [(new.get(name), old.get(name)) for new, old in zip(found, paired, strict=True)]
            row[name] = _over_seeds([None if new is None or old is None else new - old for new, old in pairs])
        rows.append(row)
    return rows


def find_optimum(plan: WorthPlan, cells: Rows) -> dict[str, Any] | None:
    """V* and J_ref of the hidden score, known or from the samples of all cells; None where nothing is known.

    From samples V* is only known to be at least `value`, the largest bound of any policy here.
    """
    from agents.runs.grading import graded_task
    from agents.runs.worth_cell import World
    from lmgym.optimum import find_known

    world = World.of(plan)
    seed = plan.seeds[0]
    stored: StoredOptimum | None = find_known(graded_task(world.training(seed)), plan.training.evaluation.split)
    if stored is not None and stored.value > stored.reference:
        return {"value": stored.value, "reference": stored.reference, "upper": stored.upper, "method": stored.method}
    bounds = [row["bound"]["mean"] for cell in cells for row in cell["rounds"] if row.get("bound") is not None]
    references = [cell["rounds"][0]["return"]["mean"] for cell in cells if cell["labels"] == 0]
    if not bounds or not references:
        return None
    reference = sum(references) / len(references)
    value = max(bounds)
    return {"value": value, "reference": reference, "upper": None, "method": "samples"} if value > reference else None


def _numbers(row: Mapping[str, Any]) -> Numbers:
    """What is averaged over seeds."""
    numbers: Numbers = {name: row[name]["mean"] for name in ("return", "kl") if name in row}
    for name, value in row.get("reward", {}).items():
        numbers[f"reward_{name}"] = value
    return numbers


def _over_seeds(numbers: Sequence[float | None]) -> dict[str, float] | None:
    """Mean with Student's interval; None where a seed has no number."""
    import torch

    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return None
    return asdict(Interval.of(torch.tensor(known, dtype=torch.float64)))


# -- in words --------------------------------------------------------------------------------------------------------


def worth_table(result: Mapping[str, Any]) -> str:
    """The table: a line for each number of labels, choice and round, with 95 % intervals over seeds."""
    seeds = len(result["seeds"])
    heading = (
        f"{result['agent']} on {result['task']}, {result['total_timesteps']:,} tokens a policy, {seeds} seeds "
        "(mean ± 95 % interval over seeds)"
    )
    keys = ["labels"]
    if len(result["choices"]) > 1:
        keys.append("choice")
    if result["rounds"] > 1:
        keys.append("round")
    parts = [heading, _aligned(result["rows"], keys), _optimum_in_words(result["optimum"])]
    if result["differences"]:
        keys.remove("choice")
        parts += ["Disagreement minus random, seed by seed:", _aligned(result["differences"], keys)]
    return "\n\n".join(parts)


def _aligned(rows: Rows, keys: Sequence[str]) -> str:
    """Lines with the keys of each row and all its columns."""
    lines = [[*keys, *_COLUMNS.values()]]
    for row in rows:
        lines.append([*(_key(row, key) for key in keys), *(_cell(row[name]) for name in _COLUMNS)])
    return aligned(lines)


def _key(row: Mapping[str, Any], key: str) -> str:
    if key == "labels":
        return "gold score" if row["labels"] is None else f"{row['labels']:,}"
    return str(row[key]) if row["labels"] else "-"


def _optimum_in_words(optimum: Mapping[str, Any] | None) -> str:
    if optimum is None:
        return "V* of the hidden score is not known, so there is no share of the gain."
    sign = ">=" if optimum["upper"] is None else "~"
    return f"J_ref = {optimum['reference']:.3f}, V* {sign} {optimum['value']:.3f} ({optimum['method']})"


def _cell(interval: Mapping[str, float | None] | None) -> str:
    if interval is None or interval["mean"] is None:
        return "-"
    low = interval["low"]
    if low is None or low == interval["mean"]:
        return f"{interval['mean']:.3f}"
    return f"{interval['mean']:.3f} ± {interval['mean'] - low:.3f}"
