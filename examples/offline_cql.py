"""d3rlpy's discrete CQL learns from a data set of half-good responses, and never acts.

    python -m agents.dataset task=echo-2 policies=medium samples=8 out=minari
    MINARI_DATASETS_PATH=minari python examples/offline_cql.py lmgym/echo-2/medium-v0

A greedy policy is certain of its action, log pi = 0. So what it earns is the env's own reward; the data set has also
subtracted the half of the KL of the policy that sampled it.
"""

from __future__ import annotations

import argparse
from typing import Any

import d3rlpy
import minari
import numpy as np
import torch
from d3rlpy.algos import DiscreteCQLConfig
from d3rlpy.models.encoders import VectorEncoderFactory

import lmgym  # noqa: F401 - registers the environments


def features(observation: Any, vocab_size: int) -> Any:
    """(n, L * V): each token one-hot, nothing where there is none yet."""
    one_hot = np.eye(vocab_size, dtype=np.float32)[observation["input_ids"]] * observation["attention_mask"][..., None]
    return one_hot.reshape(len(one_hot), -1)


def as_mdp(dataset: minari.MinariDataset, kl_coef: float, vocab_size: int) -> d3rlpy.dataset.MDPDataset:
    """The data set in d3rlpy's form, with the rewards of a policy that is certain of its tokens."""
    episodes = list(dataset.iterate_episodes())
    states = np.concatenate([features(episode.observations, vocab_size)[:-1] for episode in episodes])
    tokens = np.concatenate([episode.actions["token"] for episode in episodes])
    rewards = np.concatenate([episode.rewards + kl_coef * episode.actions["log_prob"] for episode in episodes])
    ends = np.concatenate([episode.terminations for episode in episodes])
    return d3rlpy.dataset.MDPDataset(states, tokens[:, None], rewards, ends, action_size=vocab_size)


def greedy_return(env: Any, agent: Any, prompt: int, vocab_size: int) -> float:
    """The env's return of the likeliest response to a prompt."""
    observation, _ = env.reset(options={"prompt_index": prompt})
    total = 0.0
    ended = False
    while not ended:
        token = agent.predict(features({name: x[None] for name, x in observation.items()}, vocab_size))[0]
        observation, reward, ended, _, _ = env.step({"token": int(token), "log_prob": 0.0})
        total += reward
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="discrete CQL on a Minari data set of lmgym")
    parser.add_argument("dataset", help="of a small task, such as lmgym/echo-2/medium-v0")
    parser.add_argument("--steps", type=int, default=2000, help="of gradient descent")
    args = parser.parse_args()
    torch.set_num_threads(1)  # small networks: threads only wait for each other
    dataset = minari.load_dataset(args.dataset)
    env = dataset.recover_environment()
    vocab_size = int(env.action_space["token"].n)
    numbers = {"learning_rate": 1e-3, "batch_size": 64, "gamma": 1.0, "alpha": 0.1, "target_update_interval": 100}
    agent = DiscreteCQLConfig(**numbers, encoder_factory=VectorEncoderFactory([64])).create()
    data = as_mdp(dataset, env.unwrapped.kl_coef, vocab_size)
    agent.fit(data, args.steps, args.steps, show_progress=False, logger_adapter=d3rlpy.logging.NoopAdapterFactory())
    found = np.mean([greedy_return(env, agent, i, vocab_size) for i in range(len(env.unwrapped.engine.prompts))])
    sampled = np.mean([episode.rewards.sum() for episode in dataset.iterate_episodes()])
    for name, value in (("the data set's policy", sampled), ("discrete CQL, greedy", found)):
        print(f"{name:<21}  J = {value:.4f}, {minari.get_normalized_score(dataset, value):.4f} of the gain")
