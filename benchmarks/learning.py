"""What an agent learns over seeds: `python -m benchmarks.learning --seeds 0 1 2 3 4 [Hydra overrides ...]`.

Trains once a seed, with everything as `python -m agents.train` does it, and prints means with 95 % t-intervals over
seeds, graded against the task's optimum.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from agents.runs.config import CONF
from agents.runs.defaults import complete_agents
from agents.runs.plan import check
from agents.runs.run import train
from agents.runs.surroundings import prepare_process
from lmgym.intervals import Interval

ROWS = ("return", "score", "sampled_score", "gold_score", "kl", "length", "normalised")


def interval(numbers: list[float]) -> str:
    """Mean and half-width of the 95 % t-interval; of one number, itself."""
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    found = Interval.of(torch.tensor(numbers, dtype=torch.float64))
    return f"{found.mean:.3f} ± {found.high - found.mean:.3f}"


def estimate(point: dict[str, float]) -> str:
    """A number that is known, or with the half-width of its 95 % interval."""
    half = (point["high"] - point["low"]) / 2
    return f"{point['mean']:.4f} ± {half:.4f}" if half else f"{point['mean']:.4f}"


def best(scale: dict[str, Any]) -> str:
    """V* of a task: a number where it is exact, else the one that normalises the return, and its bounds."""
    lower = scale["lower"]
    upper = scale["upper"]
    if lower is None:
        return "unknown"
    known = f">= {lower['mean']:.4f}" if upper is None else f"{lower['mean']:.4f} to {upper['mean']:.4f}"
    if scale["value"] is None:
        return known
    if upper is not None and lower["mean"] == upper["mean"]:
        return f"{scale['value']:.4f}"
    return f"{scale['value']:.4f} ({known})"


def beside(out: Path, overrides: list[str]) -> Path:
    """A folder of its own for each set of overrides, so that a finished run is never taken for another."""
    return out / re.sub(r"[^\w.+-]", "_", "__".join(sorted(overrides)))


def main() -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml, after a --")
    args = parser.parse_args()
    prepare_process()
    complete_agents()
    summaries = []
    for seed in args.seeds:
        directory = beside(args.out, args.overrides) / f"seed{seed}"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=[*args.overrides, f"seed={seed}"])
        if not (directory / "summary.json").exists():
            train(check(cfg), directory, resume=False)
        summaries.append(json.loads((directory / "summary.json").read_text()))
    seeds = len(summaries)
    steps = summaries[0]["total_timesteps"]
    print(f"\n{summaries[0]['agent']} on {summaries[0]['task']}, {seeds} seeds, about {steps:,} tokens each\n")
    print("| | before | after |\n|---|---|---|")
    for row in [row for row in ROWS if summaries[0]["after"].get(row) is not None]:
        cells = [interval([s[when][row]["mean"] for s in summaries]) for when in ("before", "after")]
        print(f"| {row} | {cells[0]} | {cells[1]} |")
    print(f"| J_ref | {estimate(summaries[0]['optimum']['reference'])} | |")
    print(f"| V* | | {best(summaries[0]['optimum'])} |")
    print(f"| training, seconds | | {interval([s['train_seconds'] for s in summaries])} |")


if __name__ == "__main__":
    main()
