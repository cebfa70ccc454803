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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from agents.runs.report import passes_the_bound
from benchmarks.learning import beside, best, estimate, interval
from benchmarks.pages import fill, has_markers, markers
from builders.optima import find_tasks
from lmgym.intervals import Interval
from lmgym.optimum import find_known
from lmgym.scores import normalised, reference_return
from lmgym.tasks import make_task

AGENTS_OWN = (
    "agent.",
    "total_timesteps=",
    "checkpoint_every=",
)  # overrides that leave the problem and its grading alone

HEADS = ("agent", "task", "J_ref", "V\\*", "J", "score", "KL, nats", "normalised")
TABLES = ("results", "leaderboard")

Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""The summaries of an agent and a task, one a seed."""


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
    optimum = find_known(make_task(task), "test")
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


def results(agents: list[str], tasks: list[str], runs: Runs) -> list[str]:
    """The first table: a line an agent and task."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    return lines + [row(agent, task, runs[agent, task]) for agent, task in itertools.product(agents, tasks)]


def row(agent: str, task: str, summaries: list[dict[str, Any]]) -> str:
    """A line of the first table."""
    scale = summaries[0]["optimum"]
    cells = [f"`{agent}`", f"`{task}`", estimate(scale["reference"]), best(scale)]
    cells += [over_seeds(summaries, "after", name) for name in ("return", "score", "kl")]
    cells += [f"**{over_seeds(summaries, 'after', 'normalised')}**"]
    return f"| {' | '.join(cells)} |"


def leaderboard(agents: list[str], tasks: list[str], runs: Runs) -> list[str]:
    """The second table: a line an agent."""
    heads = ["agent", *(f"`{task}`" for task in tasks), "forward (M)", "backward (M)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [line(agent, [runs[agent, task] for task in tasks]) for agent in agents]


def line(agent: str, by_task: list[list[dict[str, Any]]]) -> str:
    """A line of the second table: normalised returns, and millions of tokens read forward and backward."""
    cells = [f"`{agent}`", *(over_seeds(summaries, "after", "normalised") for summaries in by_task)]
    every = [summary for summaries in by_task for summary in summaries]
    cells += [f"{mean(summary[key] for summary in every) / 1e6:.2f}" for key in ("forward_tokens", "backward_tokens")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[], help="by name, or by what stands before the '-'; default all")
    parser.add_argument("--agents", nargs="+", default=["ppo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on a core each")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"))
    parser.add_argument("--write", nargs="+", type=Path, default=[], help="pages whose tables are made anew")
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml, after a --")
    args = parser.parse_args()
    for page in args.write:
        if not any(has_markers(page, name) for name in TABLES):
            parser.error(f"{page} has no markers of a table, such as {markers(TABLES[0])[0]}")
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    tasks = find_tasks(args.tasks)
    out = beside(args.out, args.overrides)
    cells = list(itertools.product(args.agents, tasks, args.seeds))
    directories = [out / "-".join(map(str, cell)) for cell in cells]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(run, directory, task, agent, seed, args.overrides)
            for directory, (agent, task, seed) in zip(directories, cells, strict=True)
        ]
        for _ in tqdm(as_completed(futures), "runs", len(futures), file=sys.stderr):
            pass
    runs: Runs = {}
    for (agent, task, _), future in zip(cells, futures, strict=True):
        runs.setdefault((agent, task), []).append(future.result())
    tables = [results(args.agents, tasks, runs), leaderboard(args.agents, tasks, runs)]
    print("\n\n".join("\n".join(lines) for lines in tables))
    for directory, future in zip(directories, futures, strict=True):
        if passes_the_bound(future.result()):
            print(f"\nAbove the upper bound of V*: {directory}")
    for page in args.write:
        for name, lines in zip(TABLES, tables, strict=True):
            if has_markers(page, name):
                fill(page, name, lines)


if __name__ == "__main__":
    main()
