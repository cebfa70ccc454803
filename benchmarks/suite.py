"""What an agent reaches on the suite: `python -m benchmarks.suite [--tasks echo-4 keyword ...] [--agents ppo ...]`.

Every cell is `python -m agents.train` itself, once a seed, a number of runs at a time. Printed are the normalised
returns, (J - J_ref) / (V* - J_ref), as means with 95 % t-intervals over seeds: 0 is the reference, 1 the optimum. The
first table has a line an agent and task, the second a line an agent, with what it cost on average over the tasks. J_ref
and V* are those the task is known by now, exact or stored, not what a run has measured or what was stored when it ran:
where a bound is tighter since, finished runs need not be repeated. Where V* is known within bounds only, the number
before them is the 1 of the normalised return.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from agents.optimum import chosen
from agents.report import passes_the_bound
from benchmarks.learning import beside, best, estimate, interval
from lmgym.intervals import Interval
from lmgym.optimum import known
from lmgym.scores import normalised, reference_return
from lmgym.tasks import make_task

AGENTS_OWN = (
    "agent.",
    "total_timesteps=",
    "checkpoint_every=",
)  # overrides that leave the problem and its grading alone


def run(directory: Path, task: str, agent: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The summary of one run, trained unless it is there."""
    if not (directory / "summary.json").is_file():
        names = [f"task={task}", f"agent={agent}", f"seed={seed}"]
        command = [sys.executable, "-m", "agents.train", *names, f"hydra.run.dir={directory}", *overrides]
        shutil.rmtree(directory, ignore_errors=True)  # of a run that was interrupted
        directory.mkdir(parents=True)
        with (directory / "log.txt").open("w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    summary = dict(json.loads((directory / "summary.json").read_text()))
    same_problem = all(x.startswith(AGENTS_OWN) for x in overrides)
    return regraded(summary, task) if same_problem else summary


def regraded(summary: dict[str, Any], task: str) -> dict[str, Any]:
    """A summary with the normalised return of its J on the scale that is known now of a task and its test prompts."""
    optimum = known(make_task(task), "test")
    if optimum is None:
        return summary
    reference = reference_return(optimum)
    after = summary["after"]
    share = normalised(Interval(**after["return"]), reference, optimum)
    lower, upper = (None if x is None else vars(Interval.point(x)) for x in (optimum.lower, optimum.upper))
    scale = {"reference": vars(reference), "lower": lower, "upper": upper, "value": optimum.value}
    return summary | {
        "after": after | {"normalised": vars(share)},
        "optimum": summary["optimum"] | scale,
    }


def over_seeds(summaries: list[dict[str, Any]], when: str, name: str) -> str:
    """A metric before or after training."""
    return interval([summary[when][name]["mean"] for summary in summaries])


def row(agent: str, task: str, summaries: list[dict[str, Any]]) -> str:
    """A line of the first table."""
    scale = summaries[0]["optimum"]
    cells = [agent, f"`{task}`", estimate(scale["reference"]), best(scale), over_seeds(summaries, "after", "return")]
    cells += [over_seeds(summaries, "after", "score"), over_seeds(summaries, "after", "kl")]
    cells += [f"**{over_seeds(summaries, 'after', 'normalised')}**"]
    cells += [f"{mean(summary['total_timesteps'] for summary in summaries):,.0f}"]
    cells += [interval([summary["train_seconds"] for summary in summaries])]
    return f"| {' | '.join(cells)} |"


def line(agent: str, by_task: list[list[dict[str, Any]]]) -> str:
    """A line of the second table: normalised returns, millions of tokens read forward and backward, and seconds."""
    cells = [f"`{agent}`", *(over_seeds(summaries, "after", "normalised") for summaries in by_task)]
    every = [summary for summaries in by_task for summary in summaries]
    cells += [f"{mean(summary[key] for summary in every) / 1e6:.2f}" for key in ("forward_tokens", "backward_tokens")]
    cells.append(f"{mean(summary['train_seconds'] for summary in every):.0f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[], help="by name, or by what stands before the '-'; default all")
    parser.add_argument("--agents", nargs="+", default=["ppo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on a core each")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"))
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml, after a --")
    args = parser.parse_args()
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    cells = list(itertools.product(args.agents, chosen(args.tasks), args.seeds))
    out = beside(args.out, args.overrides)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            cell: pool.submit(run, out / "-".join(map(str, cell)), cell[1], cell[0], cell[2], args.overrides)
            for cell in cells
        }
    tasks = chosen(args.tasks)
    print("| agent | task | J_ref | V* | J | score | KL (nats) | normalised | env steps | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for agent, task in itertools.product(args.agents, tasks):
        print(row(agent, task, [runs[agent, task, seed].result() for seed in args.seeds]))
    print(f"\n| agent | {' | '.join(f'`{task}`' for task in tasks)} | forward (M) | backward (M) | seconds |")
    print("|---" * (len(tasks) + 4) + "|")
    for agent in args.agents:
        print(line(agent, [[runs[agent, task, seed].result() for seed in args.seeds] for task in tasks]))
    for cell, result in runs.items():
        if passes_the_bound(result.result()):
            print(f"\nAbove the upper bound of V*: {out / '-'.join(map(str, cell))}")


if __name__ == "__main__":
    main()
