"""Many seeds at once against one after the other: `python -m benchmarks.many_seeds --task echo-4 --seeds 8`.

PPO with its shipped numbers. In every round each seed trains on a batch alone, and then all of them on a batch at once;
the medians over rounds are printed, and how often the second goes into the first. Nothing is graded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import gymnasium as gym
import torch

import lmgym  # noqa: F401 - registers the ids
from agents.algorithms.ppo import PPO, PPOConfig
from agents.many_seeds import ManySeeds

_BUDGET = 10**9  # tokens, which no benchmark reaches


def make_agents(task: str, seeds: int, batch_size: int, device: str) -> list[Any]:
    """Agents of so many seeds, each in an env of its own."""
    agents = []
    for seed in range(seeds):
        envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, autoreset_mode="SameStep", task=task, device=device)
        agents.append(PPO(envs, PPOConfig(batch_size=batch_size), seed=seed))
    return agents


def seconds_of_batch(train: Any, device: str) -> float:
    """How long a call takes, the GPU's work included."""
    started = time.perf_counter()
    train()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(task: str, seeds: int, batch_size: int, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of a batch of every seed, one after the other and at once."""
    alone = make_agents(task, seeds, batch_size, device)
    together = make_agents(task, seeds, batch_size, device)
    many = ManySeeds(together)

    def train_alone() -> None:
        for agent in alone:
            agent.learn(_BUDGET, lambda step, metrics: False)

    def train_together() -> None:
        many.learn(_BUDGET, {agent: lambda step, metrics: False for agent in together})

    times: dict[str, list[float]] = {"one after the other": [], "at once": []}
    for _ in range(rounds + 1):
        times["one after the other"].append(seconds_of_batch(train_alone, device))
        times["at once"].append(seconds_of_batch(train_together, device))
    return {name: statistics.median(column[1:]) for name, column in times.items()}  # the first round warms up


def main() -> None:
    """Times and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["echo-4"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"PPO, {args.batch_size} episodes a batch, {args.device}, {torch.get_num_threads()} threads\n")
    print("| task | seeds | one after the other, s | at once, s | ratio |\n|---|---|---|---|---|")
    for task in args.task:
        found = compare(task, args.seeds, args.batch_size, args.rounds, args.device)
        first = found["one after the other"]
        second = found["at once"]
        print(f"| {task} | {args.seeds} | {first:.2f} | {second:.2f} | {first / second:.2f} |", flush=True)


if __name__ == "__main__":
    main()
