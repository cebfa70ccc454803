"""Resident memory over 10,000 episodes of `reviews`, flat after the warm-up: `python -m benchmarks.leak`."""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym

import lmgym  # noqa: F401 - registers the ids
from benchmarks.env_speed import resident


def main() -> None:
    """Steps with random tokens, and prints memory ten times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--envs", type=int, default=64)
    args = parser.parse_args()
    envs: Any = gym.make_vec("lmgym/RLHF-v0", num_envs=args.envs, autoreset_mode="SameStep")
    envs.reset(seed=0)
    envs.action_space.seed(0)
    done = 0
    shown = 0
    print("| episodes | resident, MB |\n|---|---|")
    while done < args.episodes:
        _, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
        done += int((terminated | truncated).sum())
        if done >= shown + args.episodes // 10:
            shown = done
            print(f"| {done:,} | {resident('VmRSS'):.1f} |")


if __name__ == "__main__":
    main()
