"""Run directories as training leaves them, with numbers of the test's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.runs.report import write_json
from agents.runs.trust import config_text

TARGETS = {
    "ppo": "agents.algorithms.ppo.PPO",
    "rloo": "agents.algorithms.rloo.RLOO",
    "sft": "agents.algorithms.sft.SFT",
}


def point(mean: float, half: float = 0.0) -> dict[str, float]:
    """An interval as JSON."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def write_run(
    directory: Path,
    *,
    agent: str = "ppo",
    task: str = "keyword-8",
    seed: int = 0,
    returned: float = 0.5,
    rows: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    env: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    finished: bool = True,
    gold: float | None = None,
) -> Path:
    """Writes a run whose return after training is `returned`, with the files of `python -m agents.train`."""
    directory.mkdir(parents=True)
    config = {
        "task": task,
        "env": {"split": "train", "kl_coef": None, "prompt_order": "shuffle", **(env or {})},
        "agent": {"_target_": f"agents.algorithms.{TARGETS[agent]}", "lr": 5e-4, "batch_size": 256, **(settings or {})},
        "sampler": {"temperature": 1.0},
        "seed": seed,
        "total_timesteps": 1000,
        "device": "cpu",
        "checkpoint_every": 1000,
        "evaluation": {"split": "test", "samples": None, "prompts": None},
    }
    (directory / "config.yaml").write_text(config_text(config), encoding="utf-8")
    write_json(directory / "versions.json", {"python": "3.11.7", "lmgym": "0.1.0", "torch": "2.13.0"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if not finished:
        return directory
    before = {"return": point(0.02, 0.01), "score": point(0.02, 0.01), "kl": point(0.0), "length": point(8.0)}
    after = {"return": point(returned, 0.01), "score": point(returned + 0.1, 0.01), "kl": point(1.0, 0.02)}
    if gold is not None:
        before["gold_score"] = point(0.0, 0.01)
        after["gold_score"] = point(gold, 0.01)
    summary = {
        "before": before | {"normalised": None},
        "after": after | {"length": point(8.0), "normalised": point(0.123)},
        "optimum": {"reference": point(0.02), "lower": point(1.0), "upper": point(1.0), "value": 1.0},
        "train_seconds": 10.0,
        "total_timesteps": 1000,
        "forward_tokens": 3000,
        "backward_tokens": 1000,
        "agent": agent.upper(),
        "task": task,
        "seed": seed,
    }
    write_json(directory / "summary.json", summary)
    write_json(directory / "samples.json", list(samples))
    return directory


def batch(step: int, returned: float, collect: float = 0.5, update: float = 0.5) -> dict[str, Any]:
    """A row of metrics of a training batch."""
    return {
        "step": step,
        "rollout/return": returned,
        "rollout/score": returned + 0.1,
        "rollout/kl": 1.0,
        "time/collect_seconds": collect,
        "time/update_seconds": update,
        "cost/forward_tokens": 3.0 * step,
        "cost/backward_tokens": 1.0 * step,
    }


def grading(step: int, returned: float, seconds: float) -> dict[str, Any]:
    """A row of metrics of a grading along the way."""
    ends = {"eval/return": returned, "eval/return/low": returned - 0.01, "eval/return/high": returned + 0.01}
    cost = {"cost/forward_tokens": 3.0 * step, "cost/backward_tokens": 1.0 * step}
    return {"step": step, "time": seconds, **ends, "eval/normalised": 0.123, "eval/kl": 1.0, **cost}
