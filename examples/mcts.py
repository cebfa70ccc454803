"""Monte-Carlo tree search with the env as its own model: PUCT on `clone_state` and `restore_state`.

    python examples/mcts.py --simulations 400 --prompts 5

The reference is the prior of the search (Silver et al. 2017), and writes the rest of the response after a new state. A
search plays one response for certain: log pi = 0, so the env's own return is the whole return. V* is above it.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np

import lmgym


class Node:
    def __init__(self, env: Any, step: Any = (None, 0.0, False)) -> None:
        self.state = env.unwrapped.clone_state()
        self.outcome = step[4]["discounted_return"] if step[2] else None
        self.prior = np.exp(env.unwrapped.reference_log_probs())
        self.visits, self.means, self.best = np.full((3, len(self.prior)), [[0.0], [0.0], [-np.inf]])
        self.children: dict[int, Node] = {}

    def simulate(self, env: Any, rng: np.random.Generator | None) -> float:
        """The return of a response through this state; if it is new, one of the reference, greedy without `rng`."""
        action = int((self.means + 3 * self.prior * np.sqrt(1 + self.visits.sum()) / (1 + self.visits)).argmax())
        if rng is not None and not self.visits.any():
            action = int(rng.choice(len(self.prior), p=self.prior))
        if action not in self.children:
            env.unwrapped.restore_state(self.state)
            self.children[action] = Node(env, env.step(action))
        child = self.children[action]
        found = child.simulate(env, rng) if child.outcome is None else child.outcome
        self.visits[action] += 1
        self.means[action] += (found - self.means[action]) / self.visits[action]
        self.best[action] = max(self.best[action], found)
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Monte-Carlo tree search on keyword-8")
    parser.add_argument("--simulations", type=int, default=400, help="a token")
    parser.add_argument("--prompts", type=int, default=5, help="of the test split, at most 14")
    args = parser.parse_args()
    # A certain choice pays for all of its surprise, so a nat is cheap here.
    env: Any = gym.make("lmgym/Keyword-8-v0", split="test", kl_coef=0.02, device="cpu")
    rng = np.random.default_rng(0)
    returns = np.zeros((3, args.prompts))
    for i in range(args.prompts):
        env.reset(options={"prompt_index": i})
        greedy = Node(env)
        sampled = Node(env)
        node = Node(env)
        returns[:2, i] = greedy.simulate(env, None), sampled.simulate(env, rng)
        while node.outcome is None:
            for _ in range(args.simulations):
                node.simulate(env, rng)
            returns[2, i] = node.best.max()
            node = node.children[int(node.best.argmax())]
    mean = returns.mean(1)
    optimum = lmgym.solve("keyword-8", kl_coef=0.02).values[: args.prompts].mean()
    print(f"the reference: greedy {mean[0]:+.4f}, sampled {mean[1]:+.4f}; MCTS: {mean[2]:+.4f}; V*: {optimum:+.4f}")
