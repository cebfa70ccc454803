"""An iteration of our PPO, RLOO, GRPO and SFT beside TRL's and SB3's: `python -m benchmarks.ppo_speed`.

The same work on both sides: weights (GPT-2 shapes with random weights: 2 layers x 128, V = 512; 6 x 512, V = 50257),
prompts, 64 episodes of 12 + 32 tokens, 4 epochs of 4 minibatches (16 optimiser steps), KL to a frozen reference at
0.05, Adam, float32, the same threads. PPO has a reward model of one thin layer; RLOO and GRPO have 4 responses to a
prompt and a reward that costs nothing; SFT takes 16 steps on 16 texts. The models never draw an end token, so that each
response has 32 tokens. `reviews` is the task of that name: 24 tokens at most, and responses end by themselves.

Each side of a row is a process. Iterations alternate: one of ours, one of theirs, and again; the first warms up, and
medians of the others are reported. Each process checks its own work: optimiser steps and sampled tokens of every
iteration, and that the weights have changed. Memory is the peak of the whole process, libraries included. CPU seconds
are of all threads; they are what to compare on a machine that does other work as well.

What differs:
- TRL's PPOTrainer always has a value model beside the policy. `ppo` is our shared trunk beside it; `ppo-critic` is our
  separate critic (`critic=reference`), which is the same work.
- TRL generates with Hugging Face's `generate`. Its RLOO reads the responses once more for their old log-probs; ours are
  those of the decoding.
- TRL's defaults of bfloat16 and gradient checkpointing are off, and so are saving, evaluation, reporting and progress
  bars. Ours runs `learn` with its metrics (exact KL of 16 episodes) and its checks of every loss and of the weights.
- Ours clips gradients in PPO, which TRL's PPO does not.
- RLOO: our loss is the policy gradient of each token, TRL's a clipped ratio of whole responses. GRPO: each side's own.
- SB3 gets the same network as a features extractor, and an env that reads the whole state at each step.

TRL 1.12 (a later one has no PPOTrainer) and 1.16 are installed into `--venvs`, outside the repository: a network and
3 GB. Runs are added to `<out>/runs.jsonl`, and the tables are of all that are there, so that rows can be measured one
at a time: `--only ppo` takes about half a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import fill
from benchmarks.peers.inputs import write_inputs
from benchmarks.peers.venvs import ROOT, TRL, find_python
from benchmarks.peers.worker import READY, Spec, argument_of, read_report

HORIZON = 32
OURS = "lmgym"
Runs = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        size: of the models, as in `inputs.SIZES`, or "reviews".
        algorithm, critic: as in `Spec`.
        peer: "TRL" or "SB3".
        aim: how many times the peer's speed ours should have; None where nobody has set one.
    """

    size: str
    algorithm: str
    critic: str = "shared"
    peer: str = "TRL"
    aim: float | None = None

    @property
    def title(self) -> str:
        """What the table calls it."""
        critic = {"shared": "", "reference": ", separate critic"}[self.critic]
        return f"{self.algorithm.upper()}{critic}, {self.size}"


ROWS = {
    "ppo": Row("2 x 128", "ppo", aim=4.5),
    "ppo-critic": Row("2 x 128", "ppo", "reference", aim=2.5),
    "rloo": Row("2 x 128", "rloo", aim=2.5),
    "grpo": Row("2 x 128", "grpo", aim=2.5),
    "sft": Row("2 x 128", "sft"),
    "reviews-ppo": Row("reviews", "ppo"),
    "reviews-ppo-critic": Row("reviews", "ppo", "reference"),
    "reviews-rloo": Row("reviews", "rloo"),
    "reviews-grpo": Row("reviews", "grpo"),
    "large-ppo": Row("6 x 512", "ppo", aim=2.0),
    "large-ppo-critic": Row("6 x 512", "ppo", "reference", aim=1.5),
    "large-rloo": Row("6 x 512", "rloo"),
    "large-grpo": Row("6 x 512", "grpo"),
    "large-sft": Row("6 x 512", "sft"),
    "sb3": Row("2 x 128", "ppo", peer="SB3"),
}


def command_of(row: Row, side: str, venvs: Path) -> list[str]:
    """The process of one side, without its spec."""
    if side == OURS:
        return [sys.executable, "-m", "benchmarks.peers.lmgym_worker"]
    if side == "SB3":
        return [sys.executable, "-m", "benchmarks.peers.sb3_worker"]
    return [str(find_python(venvs, TRL[row.algorithm])), "-m", "benchmarks.peers.trl_worker"]


class Process:
    """A process of one side, which goes an iteration further whenever it is its turn."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        same = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._running = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **quiet, **same},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.result: dict[str, Any] | None = None
        self._wait()

    def _wait(self) -> None:
        """Reads on until the process waits, or has told its result.

        Raises:
            RuntimeError: if it ended without one, with the end of what it said.
        """
        assert self._running.stdout is not None
        for line in self._running.stdout:
            self.result = read_report(line)
            if self.result is not None or line.strip() == READY:
                return
        self._errors.seek(0)
        raise RuntimeError(f"{self._running.args} failed:\n{self._errors.read()[-3000:]}")

    def turn(self) -> None:
        """One iteration; none where the process has told its result."""
        if self.result is not None:
            return
        assert self._running.stdin is not None
        self._running.stdin.write("\n")
        self._running.stdin.flush()
        self._wait()

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        self._running.kill()
        self._running.wait()
        self._errors.close()


def measure(commands: Sequence[Sequence[str]], threads: int) -> Runs:
    """What processes measured, whose iterations alternate: one of each side, and again."""
    processes: list[Process] = []
    try:
        for command in commands:
            processes.append(Process(command, threads))
        while any(process.result is None for process in processes):
            for process in processes:
                process.turn()
        return [process.result for process in processes if process.result is not None]
    finally:
        for process in processes:
            process.close()


# -- what is written -------------------------------------------------------------------------------------------------


def median_of(runs: Runs, name: str, side: str, number: Callable[[dict[str, Any]], float | None]) -> float | None:
    """The median of a number over all timed iterations of one side of a row; None where none has it."""
    found = []
    for run in runs:
        if run["row"] == name and run["side"] == side:
            found += [value for lap in run["laps"] if (value := number({**run, **lap})) is not None]
    return statistics.median(found) if found else None


def seconds(value: float | None) -> str:
    """Seconds with three digits."""
    return "" if value is None else f"{value:.3g}"


def quotient(top: float | None, bottom: float | None) -> str:
    """A ratio, where both are known."""
    return "" if top is None or bottom is None else f"{top / bottom:.2f}"


def main_table(runs: Runs) -> list[str]:
    """Seconds an iteration, ratios and peak memory."""
    lines = ["| | lmgym, s | peer | its s | ratio | of CPU s | aim | lmgym, MB | its MB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        ours, theirs = (median_of(runs, name, side, lambda lap: lap["seconds"]) for side in (OURS, row.peer))
        if ours is None and theirs is None:
            continue
        memory = [median_of(runs, name, side, lambda lap: lap["peak_mb"]) for side in (OURS, row.peer)]
        cells = [row.title, seconds(ours), row.peer, seconds(theirs), quotient(theirs, ours)]
        cpu = [median_of(runs, name, side, lambda lap: lap["cpu"]) for side in (OURS, row.peer)]
        cells.append(quotient(cpu[1], cpu[0]))
        cells.append("" if row.aim is None else f"{row.aim:.1f}")
        cells += ["" if value is None else f"{value:,.0f}" for value in memory]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parts_table(runs: Runs) -> list[str]:
    """Where an iteration's time goes."""
    lines = ["| | lmgym: collect, s | update, s | peer: generate, s | the rest, s |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        parts = [median_of(runs, name, OURS, lambda lap, part=part: lap.get(part)) for part in ("collect", "update")]
        generate = median_of(runs, name, row.peer, lambda lap: lap.get("generate"))
        if parts[0] is None and not generate:
            continue
        rest = median_of(runs, name, row.peer, lambda lap: lap["seconds"] - lap.get("generate", 0.0))
        cells = [seconds(value) for value in (*parts, generate, rest)]
        lines.append(f"| {' | '.join([row.title, *cells])} |")
    return lines


def about(runs: Runs) -> str:
    """What the runs were made with."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for library, number in run["versions"].items():
            found.setdefault(library, set()).add(number)
    libraries = ", ".join(f"{library} {' and '.join(sorted(numbers))}" for library, numbers in sorted(found.items()))
    dates = sorted({run["date"] for run in runs})
    threads = " and ".join(sorted({str(run["threads"]) for run in runs}))
    return f"{threads} threads; {libraries}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def tables(runs: Runs) -> list[str]:
    """The lines of the page."""
    return [about(runs), "", *main_table(runs), "", *parts_table(runs)]


def read_runs(path: Path) -> Runs:
    """The runs that have been made."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add_run(path: Path, run: dict[str, Any]) -> None:
    """Adds a run to those that have been made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--sides", nargs="+", default=[OURS, "TRL", "SB3"], choices=(OURS, "TRL", "SB3"))
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side of a row; 0 prints what is there")
    parser.add_argument("--iterations", type=int, default=5, help="timed in each process, after one that warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "lmgym" / "peers")
    parser.add_argument("--out", type=Path, default=Path("runs/ppo_speed"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with markers for the table `peers`")
    return parser.parse_args(words)


def measure_row(name: str, args: argparse.Namespace, path: Path) -> None:
    """Adds runs of a row to those that have been made."""
    row = ROWS[name]
    folder = (args.out / row.size.replace(" ", "")).absolute()
    inputs = write_inputs(folder, row.size, HORIZON)
    spec = Spec(row.algorithm, critic=row.critic, iterations=args.iterations, **inputs)
    sides = [side for side in (OURS, row.peer) if side in args.sides]
    commands = [[*command_of(row, side, args.venvs), argument_of(spec)] for side in sides]
    for _ in range(args.rounds):
        for side, found in zip(sides, measure(commands, args.threads), strict=True):
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            add_run(path, {"row": name, "side": side, "date": date, **found})
            laps = ", ".join(f"{lap['seconds']:.3f}" for lap in found["laps"])
            print(f"{name}, {side}: {laps} s, {found['peak_mb']:.0f} MB", file=sys.stderr, flush=True)


def main() -> None:
    """Measures, and prints the tables."""
    args = arguments()
    path = args.out / "runs.jsonl"
    for name in args.only if args.rounds else ():
        measure_row(name, args, path)
    runs = read_runs(path)
    lines = tables(runs)
    print("\n".join(lines))
    if args.write is not None:
        fill(args.write, "peers", lines)


if __name__ == "__main__":
    main()
