"""A reward of your own: any function with the signature of TRL's reward functions, instead of the reward model.

    python examples/custom_reward.py --samples 16

To train PPO on it, in the checkout, where `examples` can be imported:

    python -m agents.train env.reward=examples.custom_reward:variety env.kl_coef=0.1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import lmgym


def variety(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Returns one float an episode: the share of words that occur once in the response, less 0.02 a token beyond 8.

    `columns` has `prompt_ids` and `completion_ids`, token ids with the EOS.
    """
    words = [completion.split() for completion in completions]
    shares = [sum(text.count(word) == 1 for word in text) / max(len(text), 1) for text in words]
    return [x - 0.02 * max(len(ids) - 8, 0) for x, ids in zip(shares, columns["completion_ids"], strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A reward of your own on the prompts and the reference of reviews")
    parser.add_argument("--samples", type=int, default=16, help="episodes a prompt")
    parser.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    env: Any = gym.make("lmgym/RLHF-v0", reward=variety, kl_coef=0.1, split="test", device="cpu")
    rng = np.random.default_rng(0)
    for i in range(3):
        env.reset(options={"prompt_index": i})
        ended = False
        while not ended:
            probs = np.exp(env.unwrapped.reference_log_probs())
            _, _, ended, _, info = env.step(int(rng.choice(len(probs), p=probs)))
        print(f"{info['score']:+.2f}  {info['prompt']}{info['response']}")
    envs: Any = gym.make_vec("lmgym/RLHF-v0", reward=variety, kl_coef=0.1, split="test", device="cpu")
    generator = torch.Generator().manual_seed(0)
    found = lmgym.evaluate(
        envs.reference_policy(), envs, samples=args.samples, prompts=args.prompts, generator=generator
    )
    score = found.metrics["score"]
    print(f"mean score of the reference: {score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]")
    if found.bound is None:
        print(f"the best return that a policy can have is not known: {found.no_bound}")
    else:
        print(f"the best return that a policy can have is at least {found.bound.low:.3f}")
