"""Several runs of one command: what their directories are called, and one table of what all of them reached."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from agents.runs.launch import launched_rank
from agents.runs.tasks import USUAL_SETTINGS
from agents.runs.trust import read_config
from lmgym.files import read_json
from lmgym.intervals import Interval

MAX_NAME = 80  # characters of a run's name, its number not counted: file systems take 255 bytes, some tools 143
SEED_DIRECTORY = "seed"  # and the seed's number: where one of many seeds goes, in the directory of all
_NAMED_FIRST = ("agent", "task", "seed", "seeds")
_KEPT_FIXED = "hydra.job.config.override_dirname.exclude_keys"


def register() -> None:
    """Makes known to Hydra what the files of conf name: the run directory."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("run_directory", run_directory, replace=True)


# -- names -----------------------------------------------------------------------------------------------------------


def run_name(_root_: DictConfig) -> str:
    """What the directory of a run is called: `ppo-keyword-8-seed0`, and after it what a multirun varies.

    Letters, digits, ".", "_", "+" and "-" alone: no shell, no file system and no other command reads them otherwise.

    Args:
        _root_: the whole config, Hydra's part included.
    """
    hydra = _root_.hydra
    task = str(_root_.task)  # perhaps one that does not exist: the run says so, in a line, and only that run ends
    choices = hydra.runtime.choices
    kind = str(choices.agent) if "agent" in choices else f"reward-{choices.reward}"
    kind = f"worth-{kind}" if "labels" in _root_ else kind
    words = [kind, USUAL_SETTINGS.get(task, task), f"seed{_root_.seed}"]
    if _root_.get("seeds", 1) != 1:
        words.append(f"seeds{_root_.seeds}")
    fixed = hydra.job.config.override_dirname.exclude_keys
    for override in given(hydra):
        key, _, value = override.lstrip("+").partition("=")
        if key not in _NAMED_FIRST and key not in fixed:
            words.append(key.rpartition(".")[2] + value if "." in key else value)
    return "-".join(map(file_name, words))[:MAX_NAME].rstrip("-")


def given(hydra: Any) -> list[str]:
    """The overrides of a command as they were written, from Hydra's part of a config."""
    return OmegaConf.to_container(hydra.overrides.task, resolve=False)  # type: ignore[return-value]


def is_given(group: str, hydra: Any) -> bool:
    """Whether a command has an override of a group, or of one of its keys."""
    return any(re.split(r"[.=]", override.lstrip("+"))[0] == group for override in given(hydra))


def output_directory(hydra: Any) -> str:
    """Where Hydra puts a run: as it is, for Hydra has written it into its config as if "${" were its own."""
    return str(OmegaConf.to_container(hydra.runtime, resolve=False)["output_dir"])  # type: ignore[call-overload, index]


def run_directory(time: str, _root_: DictConfig) -> str:
    """Where a run goes. Hydra is to make no directory for one that has its own, nor for all processes but the first."""
    return "." if _root_.resume is not None or launched_rank() else f"runs/{run_name(_root_)}-{time}"


def file_name(text: str) -> str:
    """A text with "_" for every stretch of characters that a shell, a file system or Hydra might read otherwise."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")


# -- the table -------------------------------------------------------------------------------------------------------


class Multirun(Callback):
    """Hydra's callback: has the runs named after what is varied, and notes where they go.

    Attributes:
        directory: that of the multirun which this process has begun; None if it has begun none.
    """

    directory: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the first run."""
        overrides = OverridesParser.create().parse_overrides(given(config.hydra))
        fixed = [override.key_or_group for override in overrides if not override.is_sweep_override()]
        config.hydra.overrides.hydra.append(f"{_KEPT_FIXED}=[{','.join(fixed)}]")
        Multirun.directory = Path(config.hydra.sweep.dir)


def show_multirun() -> None:
    """Prints the table of a multirun that this process has begun, whether all of its runs ended well or not."""
    if Multirun.directory is not None:
        print(f"\n{multirun_table(Multirun.directory)}", flush=True)


def multirun_table(directory: Path) -> str:
    """What several runs reached: a line a run with what tells it from the others, and means over seeds.

    Args:
        directory: of a multirun, with a folder a run; or of a run of many seeds, with a folder a seed.
    """
    found = (path for pattern in ("*", f"*/{SEED_DIRECTORY}*") for path in directory.glob(f"{pattern}/config.yaml"))
    runs = [_read(path.parent, directory) for path in found]
    runs.sort(key=lambda run: (run["number"], run["name"]))
    ended = sum(run["summary"] is not None for run in runs)
    heading = f"{ended} of {len(runs)} runs in {directory} ended (return: mean ± 95 % interval)"
    if not runs:
        return heading
    columns = _varied(runs)
    rows = [[*_titles(columns), "return", "share of the gain", "directory"]]
    rows += [[*_cells(run, columns), *_result(run["summary"]), run["name"]] for run in runs]
    parts = [heading, aligned(rows)]
    if "seed" in columns and (means := _means_over_seeds(runs, [name for name in columns if name != "seed"])):
        parts.append(aligned(means))
    return "\n\n".join(parts)


def _read(directory: Path, parent: Path) -> dict[str, Any]:
    summary = directory / "summary.json"
    name = directory.relative_to(parent).as_posix()
    numbers = re.findall(rf"(?:-|{SEED_DIRECTORY})(\d+)(?=/|$)", name)
    return {
        "name": name,
        "number": [int(number) for number in numbers] or [math.inf],
        "settings": _flat(read_config(directory / "config.yaml")),
        "summary": read_json(summary) if summary.is_file() else None,
    }


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by their dotted names."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, part in tree.items():
        leaves |= _flat(part, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def _varied(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that tell runs apart, task and agent first.

    What differs only because the agent or the task does is told by its name.
    """
    settings = [run["settings"] for run in runs]
    shared = set.intersection(*(set(one) for one in settings))
    named = ["task", "agent._target_"]
    found = [name for name in named if len({repr(one.get(name)) for one in settings}) > 1]
    for name in settings[0]:
        if name in named or name not in shared:
            continue
        values: dict[tuple[Any, ...], set[str]] = {}
        for one in settings:
            values.setdefault(tuple(one.get(other) for other in named), set()).add(repr(one[name]))
        if any(len(several) > 1 for several in values.values()):
            found.append(name)
    return found


def _titles(columns: Sequence[str]) -> list[str]:
    return ["agent" if name == "agent._target_" else name for name in columns]


def _cells(run: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    cells = {name: str(run["settings"][name]) for name in columns}
    if "agent._target_" in cells:
        cells["agent._target_"] = cells["agent._target_"].rpartition(".")[2]
    return list(cells.values())


def _result(summary: Mapping[str, Any] | None) -> list[str]:
    if summary is None:
        return ["not finished", ""]
    return [_estimate(summary["after"]["return"]), _estimate(summary["after"]["normalised"])]


def _estimate(interval: Mapping[str, float | None] | None) -> str:
    """`0.966 ± 0.008`, or "-" where nothing is known; null stands in summary.json for a number that was not finite."""
    if interval is None or interval["mean"] is None:
        return "-"
    mean = interval["mean"]
    low = interval["low"]
    high = interval["high"]
    if low is None or high is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {max(high - mean, mean - low):.3f}"


def _means_over_seeds(runs: Sequence[Mapping[str, Any]], others: Sequence[str]) -> list[list[str]]:
    """Means over runs that differ in their seed alone, with Student's interval; nothing where no two do."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["summary"] is not None:
            groups.setdefault(tuple(_cells(run, others)), []).append(run["summary"])
    rows = [[*_titles(others), "seeds", "return", "share of the gain"]]
    for cells, summaries in groups.items():
        if len(summaries) > 1:
            rows.append([*cells, str(len(summaries)), *(_over_seeds(summaries, x) for x in ("return", "normalised"))])
    return rows if len(rows) > 1 else []


def _over_seeds(summaries: Sequence[Mapping[str, Any]], name: str) -> str:
    numbers = [summary["after"][name]["mean"] for summary in summaries if summary["after"][name] is not None]
    known = [number for number in numbers if number is not None]
    if len(known) < len(summaries):
        return "-"
    import torch

    return _estimate(vars(Interval.of(torch.tensor(known, dtype=torch.float64))))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
