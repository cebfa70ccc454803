"""Tokens a second of the environments on a transition table: `python -m benchmarks.markov_speed`.

The reference costs next to nothing here, so this is the speed of the environment itself. Random actions are drawn
beforehand; every path takes the same number of tokens, in rounds, of which the median is reported.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import lmgym  # noqa: F401 - registers the ids
from lmgym.models.tables import dirichlet_rows, markov_lm
from lmgym.tasks import Task


def lengths(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs next to nothing."""
    return list(map(float, map(len, completions)))


def make_task(vocab_size: int, order: int, horizon: int) -> Task:
    """A random table with prompts of one to four tokens."""
    rng = np.random.default_rng(0)
    symbols = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(vocab_size - 1)]
    rows = dirichlet_rows(rng, vocab_size**order, vocab_size, 1.0)
    texts = [" ".join(rng.choice(symbols, size=1 + i % 4)) for i in range(64)]
    return Task(
        name="table",
        model=markov_lm(rows, symbols, order=order),
        reward=lengths,
        prompts={"train": texts},
        kl_coef=0.1,
        max_new_tokens=horizon,
    )


def rate(envs: Any, actions: np.ndarray, rounds: int) -> float:
    """Median tokens a second of stepping through actions (steps, N), after one round to warm up."""
    envs.reset(seed=0)
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for step in actions:
            envs.step(step)
        taken.append(actions.size / (time.perf_counter() - start))
    return statistics.median(taken[1:])


def main() -> None:
    """Prints one table, and with --profile where the time of the largest env goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--sync", type=int, default=16, help="N of the SyncVectorEnv of single envs")
    parser.add_argument("--vocab-size", type=int, default=17)
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--horizon", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    task = make_task(args.vocab_size, args.order, args.horizon)
    rng = np.random.default_rng(1)
    make: Any = partial(gym.make_vec, "lmgym/RLHF-v0", task=task, autoreset_mode="SameStep")
    print(f"V={args.vocab_size}, order {args.order}, T={args.horizon}, {torch.get_num_threads()} threads of torch")
    print("| env | N | tokens/s |\n|---|---|---|")
    rates = {}
    for n in sorted({*args.envs, args.sync}):
        actions = rng.integers(0, args.vocab_size, (args.steps, n))
        rates[n] = rate(make(num_envs=n), actions, args.rounds)
        print(f"| vector | {n} | {rates[n]:,.0f} |")
    singles = [partial(gym.make, "lmgym/RLHF-v0", task=task) for _ in range(args.sync)]
    sync: Any = SyncVectorEnv(singles, autoreset_mode=AutoresetMode.SAME_STEP)
    one_by_one = rate(sync, rng.integers(0, args.vocab_size, (max(args.steps // 10, 1), args.sync)), args.rounds)
    print(f"| SyncVectorEnv | {args.sync} | {one_by_one:,.0f} |")
    print(f"\nvector / SyncVectorEnv at N={args.sync}: {rates[args.sync] / one_by_one:.1f}")
    if args.profile:
        n = max(args.envs)
        envs = make(num_envs=n)
        actions = rng.integers(0, args.vocab_size, (args.steps, n))
        with cProfile.Profile() as profile:
            rate(envs, actions, 1)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
