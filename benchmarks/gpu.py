"""Checks and measures everything that runs on a GPU, in less than 8 minutes: `python -m benchmarks.gpu` (`make gpu`).

Every part is a process of its own with a limit of its own, so that one that fails, hangs or runs out of memory costs
its own rows alone; what it has measured before that stays:

- `limits`: bandwidth of a device copy and rate of a bf16 matrix product, which the other parts are compared with.
- `decode`: tokens/s of `rollout.collect` at `kl_coef=0`, of `generate` and of continuous batching of transformers,
  beside the roofline: GPT-2 124M and 1.5B and an 8B Llama shape, bf16, batches of 64, 256 and 512.
- `ppo`: a PPO iteration: tokens/s, share of the measured matrix rate, peak memory and what was estimated of it.
- `trl`: the same iteration by TRL's PPOTrainer, where TRL is installed.
- `train`: the default training run on the GPU and on the CPU of the same machine.
- `seeds`: 32 runs of `keyword-32` in one process, beside one of them alone.
- `tests`: the tests marked `gpu`.
- `profile`: the ten kernels that take the most time in a batch and an update of GPT-2 124M, and in decoding others.

Models have random weights: no download. What `pip install -e '.[agents]'` installs must be there. To a machine without
a network that has torch and transformers, carry the wheels of gymnasium, Farama-Notifications, cloudpickle, hydra-core,
omegaconf, antlr4-python3-runtime (a source archive: build its wheel before), stable-baselines3, sb3-contrib, peft,
accelerate, pytest, pluggy, iniconfig and pytest-timeout. The part `trl` needs those of trl 1.12.0, datasets, pyarrow,
dill, multiprocess and xxhash too. (`pip download --no-deps`, with the Python and the platform of that machine.)

Results go to `<out>/gpu.json` and, as Markdown tables, to `<out>/gpu.md`. `--small --device cpu` runs all of it at tiny
shapes without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_models import Setting
from benchmarks.gpu_tables import markdown

Row = dict[str, Any]

BUDGET = 465  # seconds of all parts together
LIMITS = {
    "limits": 60,
    "decode": 200,
    "ppo": 120,
    "trl": 90,
    "train": 120,
    "seeds": 90,
    "tests": 120,
    "profile": 90,
}  # seconds a part may take; in the order in which they run
MODULES = {
    "limits": "benchmarks.gpu_decode",
    "decode": "benchmarks.gpu_decode",
}  # where a part is that is not in `gpu_train`
MIN_SECONDS = 10  # what is left of the budget, for a part to be begun


def measure(part: str, setting: Setting) -> Iterator[Row]:
    """Yields the rows of a part, as they are measured."""
    module = importlib.import_module(MODULES.get(part, "benchmarks.gpu_train"))
    run: Callable[[Setting], Iterator[Row]] = getattr(module, f"measure_{part}")
    yield from run(setting)


def run_part(part: str, setting: Setting, out: Path) -> None:
    """Measures a part in this process; its rows are written one by one."""
    rows: list[Row] = []
    for row in measure(part, setting):
        rows.append(row)
        print(json.dumps(row), flush=True)
        (out / f"{part}.json").write_text(json.dumps(rows))


def run_apart(part: str, setting: Setting, out: Path, seconds: float) -> str:
    """Measures a part in a process of its own; returns what went wrong, "" where nothing did."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--out", str(out), "--device", setting.device]
    command += ["--small"] if setting.is_small else []
    (out / f"{part}.json").unlink(missing_ok=True)
    return run_within(command, seconds)


def run_within(command: Sequence[str], seconds: float) -> str:
    """Runs a command, and ends it with all that it has started when its time is over.

    Returns:
        "", or the end of what it printed where it failed.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return f"took more than {seconds:.0f} s\n{output[-2000:]}"
    return "" if process.returncode == 0 else output[-3000:]


def run_parts(parts: Sequence[str], setting: Setting, out: Path, budget: float) -> dict[str, Any]:
    """Measures parts one after the other, and writes what is known after each.

    Args:
        parts: names, in their order. setting: of all of them. out: a directory that exists.
        budget: seconds for all of them together.
    """
    ends = time.perf_counter() + budget
    results: dict[str, Any] = {"machine": machine(setting), "command": " ".join(sys.argv[1:]), "errors": {}}
    for part in parts:
        started = time.perf_counter()
        seconds = min(LIMITS[part], ends - started)
        if seconds < MIN_SECONDS:
            failure = f"no time was left of {budget:.0f} s"
        else:
            failure = run_apart(part, setting, out, seconds)
            written = out / f"{part}.json"
            if written.is_file():
                results[part] = json.loads(written.read_text())
        if failure:
            results["errors"][part] = failure
        print(f"{part}: {'failed' if failure else 'done'} in {time.perf_counter() - started:.0f} s", flush=True)
        (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "gpu.md").write_text(markdown(results))
    return results


def machine(setting: Setting) -> dict[str, str]:
    """What it was measured on."""
    import transformers

    name = torch.cuda.get_device_name() if setting.is_cuda else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def main() -> None:
    """Runs the parts, each in its own process, and writes what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu for a look at what it does")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--part", choices=list(LIMITS), help=argparse.SUPPRESS)  # this process is that part
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here. For a look at what this does: --small --device cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.device, args.small)
    if args.part is not None:
        run_part(args.part, setting, args.out)
        return
    print("\n" + markdown(run_parts(args.parts, setting, args.out, args.budget)))


if __name__ == "__main__":
    main()
