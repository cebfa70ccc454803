"""What an agent learns over seeds: `python -m benchmarks.learning --seeds 0 1 2 3 4 [Hydra overrides ...]`.

Trains once a seed, with everything as `python -m agents.train` does it, and prints means with 95 % t-intervals over
seeds, graded against the task's optimum.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from pathlib import Path

from hydra import compose, initialize_config_dir
from scipy.stats import t as student

from agents.train import check, train, wait_politely

ROWS = ("return", "score", "gold_score", "kl", "length", "normalised")


def interval(numbers: list[float]) -> str:
    """Mean and half-width of the 95 % t-interval; of one number, itself."""
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    half = student.ppf(0.975, len(numbers) - 1) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{statistics.mean(numbers):.3f} ± {half:.3f}"


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
    wait_politely()
    summaries = []
    for seed in args.seeds:
        directory = beside(args.out, args.overrides) / f"seed{seed}"
        with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
            cfg = compose("train", overrides=[*args.overrides, f"seed={seed}"])
        if not (directory / "summary.json").exists():
            train(check(cfg), directory, resume=False)
        summaries.append(json.loads((directory / "summary.json").read_text()))
    seeds, steps = len(summaries), summaries[0]["total_timesteps"]
    print(f"\n{summaries[0]['agent']} on {summaries[0]['task']}, {seeds} seeds, about {steps:,} tokens each\n")
    print("| | before | after |\n|---|---|---|")
    for row in [row for row in ROWS if row in summaries[0]["after"]]:
        cells = [interval([s[when][row]["mean"] for s in summaries]) for when in ("before", "after")]
        print(f"| {row} | {cells[0]} | {cells[1]} |")
    print(f"| V*, or at least | | {interval([s['optimum']['lower']['mean'] for s in summaries])} |")
    print(f"| training, seconds | | {interval([s['train_seconds'] for s in summaries])} |")


if __name__ == "__main__":
    main()
