"""Stable-Baselines3's DQN with its own MLP on RLHF: states are hidden states, actions the 16 likeliest tokens.

    python examples/dqn_mlp.py --steps 20000

A greedy policy is certain of its action, log pi = 0. So the env's own reward is the whole reward of the trained policy.
Action 0 is always the greedy choice of the reference.
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import DQN

import lmgym  # noqa: F401 - registers the environments
from lmgym.wrappers import EmbeddingObservation, TopKActions


def make(split: str) -> gym.Env:
    env = gym.make("lmgym/Reviews-v0", split=split, kl_coef=0.05, device="cpu")
    return EmbeddingObservation(TopKActions(env, 16))


def mean_return(env: gym.Env, agent: DQN | None, episodes: int) -> float:
    """Mean env return of a greedy policy on the first prompts of the split; without an agent, of the reference's."""
    returns = np.zeros(episodes)
    for i in range(episodes):
        obs = env.reset(options={"prompt_index": i})[0]
        ended = False
        while not ended:
            action = 0 if agent is None else int(agent.predict(obs, deterministic=True)[0])
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[i] += reward
            ended = terminated or truncated
    return float(returns.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="DQN with an MLP on lmgym/Reviews-v0")
    parser.add_argument("--steps", type=int, default=20_000, help="tokens to train on")
    parser.add_argument("--episodes", type=int, default=200, help="prompts of the test split to grade on, at most 256")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # small networks: threads only wait for each other
    rate = lambda remaining: 1e-3 * remaining  # noqa: E731 - falls to 0, so that the last policy is steady
    options = {"learning_rate": rate, "batch_size": 64, "train_freq": 4, "gradient_steps": 2}
    explore = {"learning_starts": 500, "exploration_fraction": 0.3, "target_update_interval": 500}
    net = {"net_arch": [256, 256]}
    agent = DQN("MlpPolicy", make("train"), gamma=1.0, seed=args.seed, policy_kwargs=net, **options, **explore)
    test = make("test")
    print(f"greedy decoding of the reference: {mean_return(test, None, args.episodes):+.3f}")
    print(f"DQN before training:              {mean_return(test, agent, args.episodes):+.3f}")
    agent.learn(args.steps)
    print(f"DQN after {args.steps:>6} tokens:         {mean_return(test, agent, args.episodes):+.3f}")
