"""How many seeds a comparison needs: `python -m benchmarks.seed_counts [--write docs/statistics.md]`.

Two tables. The first says how often the intervals of `lmgym.scores` hold the truth with few seeds. The second says how
many seeds the sequential test takes to tell two labels apart. Scores are normal; in the first table tasks differ in
their mean (0.2 to 1) and in how far seeds spread (0.03 to 0.2).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.pages import fill
from lmgym.intervals import Interval
from lmgym.scores import STATISTICS, ScoreMatrix, SequentialPlan, power_table, probability_of_improvement
from lmgym.scores.bootstrap import percentile_interval, resample
from lmgym.scores.improvement import METHODS

RESAMPLES = 2_000
TASKS = (1, 3, 12)
SEEDS = (3, 5, 10)
REPORTED = ("iqm", "mean")
GAPS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
FAMILIES = ((1, 1), (3, 1), (12, 1), (3, 6))  # tasks, pairs


def coverage_of_aggregates(tasks: int, seeds: int, replicates: int, rng: np.random.Generator) -> list[float]:
    """How often the interval of each of `REPORTED` holds what many seeds give, widened and then plain."""
    means = rng.uniform(0.2, 1.0, tasks)
    spreads = rng.uniform(0.03, 0.2, tasks)
    many = [rng.normal(means[task], spreads[task], 100_000) for task in range(tasks)]
    held = np.zeros((len(REPORTED), 2))
    truth = {name: float(STATISTICS[name](many)) for name in REPORTED}
    for _ in range(replicates):
        strata = [rng.normal(means[task], spreads[task], seeds) for task in range(tasks)]
        drawn = resample(strata, RESAMPLES, rng)
        for i, name in enumerate(REPORTED):
            estimates = STATISTICS[name](drawn)
            for j, expanded in enumerate((True, False)):
                interval = percentile_interval(truth[name], estimates, strata, expanded=expanded)
                held[i, j] += interval.low <= truth[name] <= interval.high
    return list((held / replicates).ravel())


def coverage_of_improvement(tasks: int, seeds: int, replicates: int, rng: np.random.Generator) -> list[float]:
    """How often the interval of the probability of improvement holds 1/2 for two labels of one algorithm, by method."""
    held = dict.fromkeys(METHODS, 0)
    names = [f"task-{task}" for task in range(tasks)]
    for _ in range(replicates):
        scores = rng.standard_normal((2, tasks, seeds))
        matrix = ScoreMatrix.from_array(scores, axes=("labels", "tasks", "seeds"), labels=("a", "b"), tasks=names)
        for method in METHODS:
            found: Interval = probability_of_improvement(
                matrix, "a", "b", method=method, rng=rng, resamples=RESAMPLES // 4
            )
            held[method] += found.low <= 0.5 <= found.high
    return [held[method] / replicates for method in METHODS]


def coverage_table(replicates: int, rng: np.random.Generator) -> Iterator[str]:
    """The lines of the first table."""
    yield "| tasks | seeds | IQM | plain | mean | plain | improvement | bootstrap |"
    yield "|---" * 8 + "|"
    for tasks, seeds in itertools.product(TASKS, SEEDS):
        shares = coverage_of_aggregates(tasks, seeds, replicates, rng)
        shares += coverage_of_improvement(tasks, seeds, replicates, rng)
        yield f"| {tasks} | {seeds} | " + " | ".join(f"{share:.2f}" for share in shares) + " |"


def power_lines(simulations: int, rng: np.random.Generator) -> Iterator[str]:
    """The lines of the second table."""
    plan = SequentialPlan()
    yield "| tasks | pairs | " + " | ".join(f"gap {gap:g}" for gap in GAPS) + " |"
    yield "|---" * (len(GAPS) + 2) + "|"
    for tasks, pairs in FAMILIES:
        table = power_table(GAPS, plan, tasks=tasks, pairs=pairs, simulations=simulations, rng=rng)
        needed = [str(seeds or f"> {table.seeds[-1]}") for seeds in table.seeds_needed().values()]
        yield f"| {tasks} | {pairs} | " + " | ".join(needed) + " |"


def main() -> None:
    """Simulates, and prints the tables line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=500, help="simulated comparisons of a row of the first table")
    parser.add_argument("--simulations", type=int, default=1_000, help="of a gap in the second")
    parser.add_argument("--write", type=Path, help="a page with the markers of the tables")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    tables = {"seeds-coverage": coverage_table(args.replicates, rng), "seeds-power": power_lines(args.simulations, rng)}
    for name, lines in tables.items():
        printed = []
        for line in lines:
            print(line, flush=True)
            printed.append(line)
        print(flush=True)
        if args.write:
            fill(args.write, name, printed)


if __name__ == "__main__":
    main()
