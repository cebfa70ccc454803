"""What the processes of `benchmarks.ppo_speed` have in common: what each is told, and what each measures and checks.

It runs in the environments of other libraries, so it imports the standard library and torch alone.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

KL_COEF = 0.05
LR = 1e-5
READY = "READY"  # a process says so before each iteration, and waits for a line
RESULT = "RESULT "
LIBRARIES = ("torch", "transformers", "trl", "stable-baselines3")


@dataclass(frozen=True)
class Spec:
    """The work of a process: the same numbers whoever does it.

    Attributes:
        algorithm: "ppo", "rloo", "grpo" or "sft". critic: "shared" or "reference", of PPO.
        model, reward: directories of Hugging Face models with their tokenizers.
        prompts: a JSON list of texts. texts: JSON lines with "prompt" and "completion".
        batch: episodes, or texts, an iteration. horizon: tokens of a response, at most.
        epochs, minibatches: their product is the number of optimiser steps an iteration.
        group: responses to each prompt, of RLOO and GRPO.
        iterations: that are timed, after one that warms up.
        is_fixed: whether every response has `horizon` tokens.
    """

    algorithm: str
    model: str
    reward: str
    prompts: str
    texts: str
    critic: str = "shared"
    batch: int = 64
    horizon: int = 32
    epochs: int = 4
    minibatches: int = 4
    group: int = 4
    iterations: int = 3
    is_fixed: bool = True

    @property
    def steps(self) -> int:
        """Optimiser steps an iteration."""
        return self.epochs * self.minibatches

    def read_prompts(self) -> list[str]:
        """The prompts."""
        return json.loads(Path(self.prompts).read_text(encoding="utf-8"))

    def read_texts(self) -> list[dict[str, str]]:
        """The demonstrations."""
        return [json.loads(line) for line in Path(self.texts).read_text(encoding="utf-8").splitlines()]


def spec_of(argument: str) -> Spec:
    """The spec that a process was given on its command line."""
    return Spec(**json.loads(argument))


def argument_of(spec: Spec) -> str:
    """A spec as an argument of a command line."""
    return json.dumps(asdict(spec))


def even_share(prompts: list[str], completions: list[str], completion_ids: Any, **columns: Any) -> list[float]:
    """The share of even token ids in each response: a reward that costs nothing and can be learned."""
    return [sum(int(token) % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Meter:
    """Seconds, optimiser steps and tokens of each iteration, and the memory of the process.

    Before each iteration it waits for its turn.

    Args:
        spec: what is measured.
        weights: of the model that must learn.
    """

    def __init__(self, spec: Spec, weights: list[torch.nn.Parameter]) -> None:
        self.spec = spec
        self._weights = weights
        self._before = self._fingerprint()
        self._laps: list[dict[str, float]] = []
        self._steps = 0
        self._loaded = resident("VmRSS")
        self._started = 0.0
        self._cpu = 0.0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._steps += 1

    def _fingerprint(self) -> list[float]:
        return [weight.detach().double().norm().item() for weight in self._weights]

    def start(self) -> None:
        """An iteration begins here, as soon as it is this process's turn."""
        wait_for_turn()
        self._steps = 0
        self._cpu = time.process_time()
        self._started = time.perf_counter()

    def lap(self, sampled: int, learned: int, **parts: float) -> None:
        """An iteration ends here, and the next begins.

        Args:
            sampled: tokens of its responses. learned: tokens, prompts included, that gradients were taken through.
            parts: seconds of its parts.
        """
        lap = {"seconds": time.perf_counter() - self._started, "cpu": time.process_time() - self._cpu}
        lap |= {"steps": self._steps, "sampled": sampled, "learned": learned}
        self._laps.append(lap | parts)
        if len(self._laps) <= self.spec.iterations:
            self.start()

    def result(self) -> dict[str, Any]:
        """What was measured, once it is certain that the work was done.

        Raises:
            RuntimeError: where iterations, optimiser steps or tokens are not those of the spec, or nothing was learned.
        """
        self._check()
        return {
            "laps": self._laps[1:],  # the first warms up
            "peak_mb": resident("VmHWM"),
            "loaded_mb": self._loaded,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def _check(self) -> None:
        spec = self.spec
        if len(self._laps) != spec.iterations + 1:
            raise RuntimeError(f"There must be {spec.iterations + 1} iterations, got {len(self._laps)}.")
        for lap in self._laps:
            check_lap(spec, lap)
        moved = [before != after for before, after in zip(self._before, self._fingerprint(), strict=True)]
        if sum(moved) < 0.9 * len(moved):
            raise RuntimeError(f"Learning must change the weights, and {sum(moved)} of {len(moved)} have changed.")


def check_lap(spec: Spec, lap: dict[str, float]) -> None:
    """Raises `RuntimeError` where an iteration was not the work of the spec."""
    if lap["steps"] != spec.steps:
        raise RuntimeError(f"An iteration must have {spec.steps} optimiser steps, got {lap['steps']}.")
    if spec.algorithm == "sft":
        return
    most = spec.batch * spec.horizon
    if not 0 < lap["sampled"] <= most or (spec.is_fixed and lap["sampled"] != most):
        raise RuntimeError(f"An iteration must sample {most} tokens, got {lap['sampled']}.")


def resident(field: str) -> float:
    """MB of this process: VmRSS now, or VmHWM at its peak.

    Not `getrusage`: a process inherits that peak from the one that has started it.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


def versions() -> dict[str, str]:
    """Versions of Python and of what is installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def count_until(ids: torch.Tensor, end: int) -> int:
    """Tokens of responses (B, T) up to the first `end` of each, which counts."""
    ended = (ids == end).int()
    return int((ended.cumsum(1) - ended == 0).sum())


def wait_for_turn() -> None:
    """Tells the process that has started this one that it is ready, and waits until it says so."""
    print(READY, file=sys.__stdout__, flush=True)
    sys.stdin.readline()


def report(result: dict[str, Any]) -> None:
    """Prints what was measured, for the process that has started this one."""
    print(RESULT + json.dumps(result), file=sys.__stdout__, flush=True)


def read_report(line: str) -> dict[str, Any] | None:
    """What `report` printed; None for any other line."""
    return json.loads(line.removeprefix(RESULT)) if line.startswith(RESULT) else None
