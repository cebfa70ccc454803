"""Metrics of an algorithm of Stable-Baselines3, as every agent reports them.

Shapes: N rows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents.agent import Callback, TokenCount


class TrainingStopped(Exception):
    """The caller wants no further batch."""


class MetricsCallback(BaseCallback):
    """Reports the episodes that ended and the update on them, every `every` env steps.

    Args:
        gamma: of the returns.
        every: env steps between two rows of metrics.
        tokens: what the networks have read.
        check: called before each report; raises for weights that are not finite.

    Attributes:
        receiver: gets (num_timesteps, metrics); training stops if it returns False.
    """

    def __init__(self, gamma: float, every: int, tokens: TokenCount, check: Callable[[], None]) -> None:
        super().__init__()
        self.gamma = gamma
        self.every = every
        self.tokens = tokens
        self.check = check
        self.receiver: Callback | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the episodes that have not been reported."""
        self._running: list[dict[str, float]] = []  # of each of the N rows, sums over the episode so far
        self._ended: list[dict[str, float]] = []
        self._steps = 0

    def get_state(self) -> dict[str, Any]:
        """What has not been reported, as JSON values."""
        rows = [dict(row) for row in self._running]
        return {"rows": rows, "ended": list(self._ended), "steps": self._steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` gave."""
        self._running = state["rows"]
        self._ended = state["ended"]
        self._steps = state["steps"]

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        rewards = self.locals["rewards"]
        log_probs = self.locals["log_probs"].cpu().numpy() if "log_probs" in self.locals else np.zeros(len(infos))
        self._running = self._running or [_zero_sums() for _ in infos]
        for i, (row, info) in enumerate(zip(self._running, infos, strict=True)):
            row["return"] += self.gamma ** row["length"] * float(rewards[i])
            row["kl"] += float(log_probs[i]) - info.get("ref_log_prob", 0.0)
            row["length"] += 1
            if self.locals["dones"][i]:
                row |= {name: info[name] for name in ("score", "gold_score") if name in info}
                row["eos_fraction"] = float(info["finish_reason"] == "eos")
                self._ended.append(row)
                self._running[i] = _zero_sums()
        self._steps += len(infos)
        return True

    def _on_rollout_start(self) -> None:
        if self._steps >= self.every:
            self._report()

    def _on_training_end(self) -> None:
        if self._steps:
            with contextlib.suppress(TrainingStopped):
                self._report()

    def _report(self) -> None:
        self.check()
        seconds = time.perf_counter() - self._started
        metrics = {name: float(x) for name, x in self.logger.name_to_value.items()}
        for name in self._ended[0] if self._ended else ():
            metrics[f"rollout/{name}"] = float(np.mean([row[name] for row in self._ended]))
        if not self.training_env.get_attr("kl_coef")[0]:
            metrics.pop("rollout/kl", None)  # at kl_coef=0 the reference is not run
        metrics["time/tokens_per_second"] = self._steps / seconds
        metrics |= self.tokens.metrics()
        self._ended = []
        self._steps = 0
        if self.receiver is not None and self.receiver(self.num_timesteps, metrics) is False:
            raise TrainingStopped
        self._started = time.perf_counter()  # what the receiver does is no training


class RolloutCallback(BaseCallback):
    """Calls one function before every rollout, and another when it is whole."""

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def _on_rollout_start(self) -> None:
        self.before()

    def _on_rollout_end(self) -> None:
        self.after()

    def _on_step(self) -> bool:
        return True


def _zero_sums() -> dict[str, float]:
    return {"return": 0.0, "kl": 0.0, "length": 0.0}
