"""What SB3's algorithms cost a token as `agents/sb3/agent.py` runs them: `python -m benchmarks.sb3_speed`.

Each agent at its yaml's numbers (learning from 100 tokens on), against itself with every state read alone, minibatches
of single steps and sb3-contrib's own gradients of TRPO. The two are interleaved; medians of CPU seconds of the process
are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import OmegaConf
from torch import Tensor

from agents.sb3.agent import SB3Agent
from agents.sb3.config import SB3Config
from lmgym.envs.vector import RLHFVectorEnv

_AGENTS = Path(__file__).parents[1] / "conf" / "agent"
_ALL = ("sb3_ppo", "sb3_a2c", "sb3_maskable_ppo", "sb3_recurrent_ppo", "sb3_dqn", "sb3_qrdqn", "sb3_trpo")


def alone(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `agents.sb3.network._share_prefixes` returns, with a sequence for every state."""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    every = torch.arange(len(ids), device=ids.device)
    return torch.where(mask, ids, -1).gather(1, order), every, (mask.sum(1) - 1).clamp(min=0), every


@contextmanager
def each_alone(shared: bool) -> Iterator[None]:
    """Takes away what is done for speed, unless `shared`."""
    if shared:
        yield
        return
    with (
        patch("agents.sb3.network._share_prefixes", alone),
        patch("agents.sb3.algorithms.with_one_backward", lambda trpo: trpo),
    ):
        yield


def make(name: str, task: str, shared: bool) -> SB3Agent:
    """The agent of a yaml, past its first rollout and update."""
    config: Any = OmegaConf.to_container(OmegaConf.load(_AGENTS / f"{name}.yaml"))
    del config["_target_"]
    config["kwargs"].pop("learning_starts", None)
    if not shared:
        config["stretch"] = None
    numbers = SB3Config(**config)
    envs = RLHFVectorEnv(numbers.n_envs, autoreset_mode="SameStep", task=task, device="cpu")
    with each_alone(shared):
        agent = SB3Agent(envs, numbers)
        agent.learn(1024)
    return agent


def cost(agent: SB3Agent, shared: bool, tokens: int) -> tuple[float, float]:
    """CPU seconds and tokens read, forward and backward, for a token learned from."""
    steps = agent.num_timesteps
    read = agent.tokens.forward + agent.tokens.backward
    started = time.process_time()
    with each_alone(shared):
        agent.learn(agent.num_timesteps + tokens)
    steps = agent.num_timesteps - steps
    return (time.process_time() - started) / steps, (agent.tokens.forward + agent.tokens.backward - read) / steps


def main() -> None:
    """Times and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", default=_ALL, choices=_ALL)
    parser.add_argument("--tasks", nargs="+", default=["keyword-8", "reviews"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="a round; an on-policy agent finishes its rollout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| agent | task | tokens a CPU second | each state alone | ratio | tokens read a token | each state alone |")
    print("|---|---|---|---|---|---|---|")
    for name in args.agents:
        for task in args.tasks:
            agents = {shared: make(name, task, shared) for shared in (True, False)}
            found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for _ in range(args.rounds):
                for shared, agent in agents.items():
                    found[shared].append(cost(agent, shared, args.tokens))
            ours, theirs = (
                [statistics.median(column) for column in zip(*found[s], strict=True)] for s in (True, False)
            )
            cells = [f"{1 / ours[0]:,.0f}", f"{1 / theirs[0]:,.0f}", f"{theirs[0] / ours[0]:.1f}"]
            print(f"| `{name}` | `{task}` | {' | '.join(cells)} | {ours[1]:.1f} | {theirs[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
