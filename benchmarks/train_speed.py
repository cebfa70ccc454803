"""How long a batch of the default training run takes by each way of collecting: `python -m benchmarks.train_speed`.

The same PPO on `reviews` with whole episodes (`collect`), with steps through the native vector env, and with steps
through a `SyncVectorEnv` of single envs. Ways are interleaved and medians are reported, collection and update apart.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import lmgym  # noqa: F401 - registers the ids
from agents.algorithms.ppo import PPO, PPOConfig
from lmgym.rollout import collect_steps


def steps_through(agent: PPO, envs: Any) -> None:
    """Has an agent collect through the step loop of any vector env."""

    def gather() -> Any:
        return collect_steps(envs, agent.policy, agent.config.batch_size, agent.sampler, agent.generator)

    agent.collect = gather  # type: ignore[method-assign]


def main() -> None:
    """Times and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()
    config = PPOConfig(batch_size=args.batch_size)
    one: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=1, autoreset_mode="SameStep")
    many: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=args.batch_size, autoreset_mode="SameStep")
    single = [lambda: gym.make("lmgym/RLHF-v0", disable_env_checker=True)] * args.batch_size
    sync = SyncVectorEnv(single, autoreset_mode=AutoresetMode.SAME_STEP)
    agents = {name: PPO(one, config) for name in ("episodes", "steps, native", "steps, SyncVectorEnv")}
    steps_through(agents["steps, native"], many)
    steps_through(agents["steps, SyncVectorEnv"], sync)
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in agents}
    for _ in range(args.rounds + 1):
        for name, agent in agents.items():
            seen: list[dict[str, float]] = []
            agent.learn(agent.num_timesteps + 1, lambda _, metrics, seen=seen: seen.append(metrics))  # type: ignore[misc]
            times = seen[0]["time/collect_seconds"], seen[0]["time/update_seconds"], seen[0]["time/tokens_per_second"]
            rows[name].append(times)
    print(f"PPO on reviews, {args.batch_size} episodes a batch, {torch.get_num_threads()} threads\n")
    print("| collect | collecting, s | updating, s | tokens/s |\n|---|---|---|---|")
    for name, times in rows.items():
        medians = [statistics.median(column) for column in zip(*times[1:], strict=True)]  # the first round warms up
        print(f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} | {medians[2]:,.0f} |")


if __name__ == "__main__":
    main()
