"""A process that trains with this project's agents: `python -m benchmarks.peers.lmgym_worker SPEC`."""

from __future__ import annotations

import sys
from typing import Any

from agents.algorithms.grpo import GRPO, GRPOConfig
from agents.algorithms.ppo import PPO, PPOConfig
from agents.algorithms.rloo import RLOO, RLOOConfig
from agents.algorithms.sft import SFT, SFTConfig
from benchmarks.peers.worker import KL_COEF, LR, Meter, Spec, even_share, report, spec_of
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.tasks import Task

GROUPED: dict[str, tuple[Any, Any]] = {"rloo": (RLOO, RLOOConfig), "grpo": (GRPO, GRPOConfig)}


def make_agent(spec: Spec) -> Any:
    """The agent of a spec, on a task of its own."""
    task = Task(
        name="peers",
        model=spec.model,
        reward=spec.reward if spec.algorithm == "ppo" else even_share,
        prompts={"train": spec.read_prompts()},
        kl_coef=KL_COEF,
        max_new_tokens=spec.horizon,
    )
    rows = spec.group if spec.algorithm in GROUPED else 1
    envs = RLHFVectorEnv(rows, task=task, group_size=rows, device="cpu")
    if spec.algorithm == "sft":
        size = spec.batch // spec.minibatches
        config = SFTConfig(batch_size=size, epochs=10**6, lr=LR, demonstrations="file", path=spec.texts)
        return SFT(envs, config)
    numbers: dict[str, Any] = {
        "batch_size": spec.batch,
        "epochs": spec.epochs,
        "minibatches": spec.minibatches,
        "lr": LR,
        "lr_schedule": "constant",
    }
    if spec.algorithm == "ppo":
        return PPO(envs, PPOConfig(critic=spec.critic, vf_coef=0.1, **numbers))  # type: ignore[arg-type]
    kind, config_kind = GROUPED[spec.algorithm]
    return kind(envs, config_kind(group_size=spec.group, **numbers))


class Watch:
    """A callback of `learn` that ends an iteration, of one batch or of so many optimiser steps on texts."""

    def __init__(self, agent: Any, meter: Meter) -> None:
        self.agent = agent
        self.meter = meter
        self.calls = 0
        self.laps = 0
        self.sampled = 0
        self.learned = 0

    def __call__(self, sampled: int, metrics: dict[str, float]) -> bool:
        spec = self.meter.spec
        self.calls += 1
        if spec.algorithm == "sft" and self.calls % spec.steps:
            return True
        learned = self.agent.tokens.backward
        parts = {name: metrics[f"time/{name}_seconds"] for name in ("collect", "update") if spec.algorithm != "sft"}
        self.meter.lap(sampled - self.sampled, learned - self.learned, **parts)
        self.sampled = sampled
        self.learned = learned
        self.laps += 1
        return self.laps <= spec.iterations


def run(spec: Spec) -> dict[str, Any]:
    """Trains and measures."""
    agent = make_agent(spec)
    meter = Meter(spec, list(agent.policy.actor.parameters()))
    watch = Watch(agent, meter)
    meter.start()
    agent.learn(10**9, watch)
    return meter.result()


if __name__ == "__main__":
    report(run(spec_of(sys.argv[1])))
