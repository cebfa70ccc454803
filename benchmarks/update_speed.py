"""How long an optimiser step of PPO takes, by the plain forward and as it is run: `python -m benchmarks.update_speed`.

*Plain* is the Hugging Face forward over padded rows, with autograd's own log-softmax and entropy, and all episodes of
the minibatch at once. Both step the same policy in one process, in turn. Times are of the processor, of one thread,
because machines are shared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import agents.batch
from agents.algorithms.ppo import PPO, PPOConfig
from agents.batch import Batch
from benchmarks.env_speed import SIZES, make_model, zero
from lmgym.kl import entropy
from lmgym.models.causal import CausalLM

PROMPT = 12  # tokens
RESPONSE = 32
ROUNDS = {"small": 12, "reviews": 12, "large": 3}
EPISODES = {"small": 16, "reviews": 64, "large": 16}  # of a minibatch


def make_envs(shape: str, directory: Path) -> Any:
    """The task `reviews`, or random weights with prompts and responses of one length."""
    if shape == "reviews":
        return gym.make_vec("lmgym/RLHF-v0", num_envs=1, autoreset_mode="SameStep", device="cpu")
    rng = np.random.default_rng(0)
    words = rng.integers(3, SIZES[shape]["vocab_size"], (64, PROMPT))
    return gym.make_vec(
        "lmgym/RLHF-v0",
        num_envs=1,
        autoreset_mode="SameStep",
        device="cpu",
        model=make_model(directory, shape, 64),
        reward=zero,
        prompts=[" ".join(f"w{i}" for i in row) for row in words],
        kl_coef=0.1,
        max_new_tokens=RESPONSE,
        min_new_tokens=RESPONSE - 1,
    )


def plain_log_probs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What `log_probs_and_entropies` gives, by autograd."""
    log_distribution = logits.float().log_softmax(-1)
    return log_distribution.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy(log_distribution)


def plain_read(
    lm: CausalLM, ids: Tensor, rows: Tensor, columns: Tensor, autocast: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """What `CausalLM.read_at` gives, by the Hugging Face forward."""
    return lm.response_hidden(ids, rows, columns)


@contextmanager
def plainly(agent: PPO) -> Iterator[None]:
    """A block in which an agent updates by the plain forward."""
    policy: Any = agent.policy
    lean_critic = policy._lean_critic
    policy._lean_critic = None
    with (
        mock.patch.object(CausalLM, "read_at", plain_read),
        mock.patch.object(agents.batch, "log_probs_and_entropies", plain_log_probs),
        mock.patch.object(agents.batch, "_CPU_EPISODES", 1 << 20),
    ):
        yield
    policy._lean_critic = lean_critic


@contextmanager
def coarsely(agent: PPO) -> Iterator[None]:
    """A block in which an agent updates with `autocast=bfloat16`."""
    policy: Any = agent.policy
    policy.autocast = torch.bfloat16
    yield
    policy.autocast = None


def seconds(agent: PPO, minibatch: Batch) -> float:
    """Processor time of one optimiser step."""
    started = time.process_time()
    agent.updater.step(agent.losses(minibatch))
    return time.process_time() - started


def main() -> None:
    """Times and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| shape | critic | plain, ms | as it is run, ms | ratio | bfloat16, ms |\n|---|---|---|---|---|---|")
    for shape in args.shapes:
        for critic in ("shared", "reference"):
            with tempfile.TemporaryDirectory() as directory:
                agent = PPO(make_envs(shape, Path(directory)), PPOConfig(batch_size=64, critic=critic))  # type: ignore[arg-type]
            minibatch = agent.shape(agent.collect())[torch.arange(EPISODES[shape])].sort_by_length()
            plain = []
            lean = []
            coarse = []
            for _ in range(ROUNDS[shape] + 1):
                with plainly(agent):
                    plain.append(seconds(agent, minibatch))
                lean.append(seconds(agent, minibatch))
                with coarsely(agent):
                    coarse.append(seconds(agent, minibatch))
            before = 1000 * statistics.median(plain[1:])  # the first round warms up
            after = 1000 * statistics.median(lean[1:])
            half = 1000 * statistics.median(coarse[1:])
            row = f"| {shape} | {critic} | {before:,.1f} | {after:,.1f} | {before / after:.2f} | {half:,.1f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
