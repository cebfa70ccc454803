"""The tables of docs/agents from finished runs: `python -m benchmarks.tables runs/suite --agents ppo --write PAGE.md`.

`python -m agents.compare ... out=runs/suite` makes the runs. Printed are the normalised returns, (J - J_ref) / (V* -
J_ref), as means with 95 % t-intervals over seeds: 0 is the reference, 1 the optimum. The first table has a line an
agent and task, the second a line an agent, with what it cost on average over the tasks. Where runs were graded along
the way, a third says what it took to reach 0.9 of the gain; of one agent on one task the last has all metrics before
and after. J_ref and V* are those the task is known by now, exact or stored, not what a run has measured or what was
stored when it ran: where a bound is tighter since, finished runs need not be repeated. Where V* is known within bounds
only, the number before them is the 1 of the normalised return.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from agents.comparison.table import read_runs
from agents.comparison.terminal import shown
from agents.runs.report import passes_the_bound
from benchmarks.pages import fill, has_markers, markers
from builders.optima import find_tasks
from lmgym.errors import InvalidArgumentError

HEADS = ("agent", "task", "J_ref", "V\\*", "J", "score", "KL, nats", "normalised")
TABLES = ("results", "leaderboard", "speedrun")
GOAL = "0.9"  # of the gain: what a speedrun is after
METRICS = ("return", "score", "sampled_score", "gold_score", "kl", "length", "normalised")

Runs = dict[tuple[str, str], list[Mapping[str, Any]]]
"""The summaries of an agent and a task, one a seed."""


def find_runs(directories: Sequence[Path], agents: Sequence[str], tasks: Sequence[str]) -> Runs:
    """The summaries of finished runs; agents are named as on a command line, or by what was varied of them.

    Raises:
        InvalidArgumentError: for an agent and a task of which none is there.
    """
    table = read_runs(directories)
    runs: Runs = {}
    for agent, task in itertools.product(agents, tasks):
        several = table.of(agent, task)
        if not several:
            raise InvalidArgumentError(
                f"`directories` must hold finished runs of {agent} on {task}, and have {table.labels()} on "
                f"{table.tasks()}."
            )
        for run in several:
            if passes_the_bound(run.summary):
                print(f"Above the upper bound of V*: {run.directory}\n")
        runs[agent, task] = [run.summary for run in several]
    return runs


def over_seeds(summaries: Sequence[Mapping[str, Any]], when: str, name: str) -> str:
    """A metric before or after training: its mean with the 95 % t-interval."""
    return shown([summary[when][name]["mean"] for summary in summaries])


def estimate(point: Mapping[str, float]) -> str:
    """A number that is known, or with the half-width of its 95 % interval."""
    half = (point["high"] - point["low"]) / 2
    return f"{point['mean']:.4f} ± {half:.4f}" if half else f"{point['mean']:.4f}"


def best(scale: Mapping[str, Any]) -> str:
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


# -- the tables ------------------------------------------------------------------------------------------------------


def results(agents: Sequence[str], tasks: Sequence[str], runs: Runs) -> list[str]:
    """The first table: a line an agent and task."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    return lines + [row(agent, task, runs[agent, task]) for agent, task in itertools.product(agents, tasks)]


def row(agent: str, task: str, summaries: Sequence[Mapping[str, Any]]) -> str:
    """A line of the first table."""
    scale = summaries[0]["optimum"]
    cells = [f"`{agent}`", f"`{task}`", estimate(scale["reference"]), best(scale)]
    cells += [over_seeds(summaries, "after", name) for name in ("return", "score", "kl")]
    cells += [f"**{over_seeds(summaries, 'after', 'normalised')}**"]
    return f"| {' | '.join(cells)} |"


def leaderboard(agents: Sequence[str], tasks: Sequence[str], runs: Runs) -> list[str]:
    """The second table: a line an agent."""
    heads = ["agent", *(f"`{task}`" for task in tasks), "forward (M)", "backward (M)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [line(agent, [runs[agent, task] for task in tasks]) for agent in agents]


def line(agent: str, by_task: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """A line of the second table: normalised returns, and millions of tokens read forward and backward."""
    cells = [f"`{agent}`", *(over_seeds(summaries, "after", "normalised") for summaries in by_task)]
    every = [summary for summaries in by_task for summary in summaries]
    cells += [f"{mean(summary[key] for summary in every) / 1e6:.2f}" for key in ("forward_tokens", "backward_tokens")]
    return f"| {' | '.join(cells)} |"


def speedrun(agents: Sequence[str], tasks: Sequence[str], runs: Runs) -> list[str]:
    """The third table: a line an agent, with what it took to reach 0.9 of the gain on each task."""
    lines = [f"| agent | {' | '.join(f'`{task}`' for task in tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for agent in agents:
        cells = [f"`{agent}`", *(time_to_goal(runs[agent, task]) for task in tasks)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def time_to_goal(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Medians over seeds of seconds and of tokens read; a seed that never got there counts as for ever."""
    points = [(summary.get("solved_at") or {}).get(GOAL) for summary in summaries]
    reached = [point for point in points if point is not None]
    count = f"{len(reached)} of {len(points)} seeds"
    never = [math.inf] * (len(points) - len(reached))
    seconds = median([point["seconds"] for point in reached] + never)
    tokens = median([point["forward_tokens"] for point in reached] + never)
    return f"{seconds:.1f} s, {tokens / 1e6:.2f} M ({count})" if math.isfinite(seconds) else f"not reached ({count})"


def before_and_after(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last table: all metrics of one agent on one task, and the seconds of its training."""
    lines = ["| | before | after |", "|---|---|---|"]
    for name in METRICS:
        if summaries[0]["after"].get(name) is not None:
            cells = [over_seeds(summaries, when, name) for when in ("before", "after")]
            lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines.append(f"| J_ref | {estimate(summaries[0]['optimum']['reference'])} | |")
    lines.append(f"| V* | | {best(summaries[0]['optimum'])} |")
    return [*lines, f"| training, seconds | | {shown([summary['train_seconds'] for summary in summaries])} |"]


def main() -> None:
    """Prints the tables, and writes them into pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, help="of a comparison, or of runs")
    parser.add_argument("--tasks", nargs="+", default=[], help="by name, or by what stands before the '-'; default all")
    parser.add_argument("--agents", nargs="+", default=["ppo"])
    parser.add_argument("--write", nargs="+", type=Path, default=[], help="pages whose tables are made anew")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which of them; default all")
    args = parser.parse_args()
    for page in args.write:
        if not any(has_markers(page, name) for name in args.tables):
            parser.error(f"{page} has no markers of a table, such as {markers(args.tables[0])[0]}")
    tasks = find_tasks(args.tasks)
    runs = find_runs(args.directories, args.agents, tasks)
    tables = [results(args.agents, tasks, runs), leaderboard(args.agents, tasks, runs)]
    tables.append(speedrun(args.agents, tasks, runs))
    graded = any(summary.get("solved_at") for several in runs.values() for summary in several)
    shown_tables = tables if graded else tables[:2]
    if len(runs) == 1:
        shown_tables = [*shown_tables, before_and_after(*runs.values())]
    print("\n\n".join("\n".join(lines) for lines in shown_tables))
    for page in args.write:
        for name, lines in zip(TABLES, tables, strict=True):
            if name in args.tables and has_markers(page, name):
                fill(page, name, lines)


if __name__ == "__main__":
    main()
