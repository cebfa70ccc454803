"""An agent of your own, from scratch: tabular soft Q-learning in a step loop, compared with the known optimum.

    python examples/custom_agent.py --steps 6000

The env pays kl_coef * log pi_ref and the score. The other half of the KL, -kl_coef * log pi, is an entropy bonus. So
RLHF is maximum-entropy RL of the env's own reward at temperature kl_coef (Haarnoja et al. 2017, eqs. 8 and 9):

    V(s) = kl_coef * log sum_a exp(Q(s, a) / kl_coef),    pi(a|s) = exp((Q(s, a) - V(s)) / kl_coef)

Transitions are deterministic, so a visit can set Q(s, a) to r + gamma * V(s') without a learning rate. Q starts above
every Q*. So V falls to V*, while J(pi) rises to V*.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import gymnasium as gym
import numpy as np

import lmgym  # noqa: F401 - registers the environments


def soft_value(q: np.ndarray, temperature: float) -> float:
    return float(q.max() + temperature * np.log(np.exp((q - q.max()) / temperature).sum()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tabular soft Q-learning on a task of the suite")
    parser.add_argument("--task", default="echo-2", help="a task with a few hundred states; stop-4 has 400,000")
    parser.add_argument("--highest", type=float, default=2.0, help="where Q starts: at least the largest score")
    parser.add_argument("--steps", type=int, default=6_000, help="tokens to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    env: Any = gym.make("lmgym/RLHF-v0", task=args.task, split="test", obs_format="flat", device="cpu")
    kl_coef = env.unwrapped.kl_coef
    gamma = env.unwrapped.gamma
    optimum = env.unwrapped.task.optima["test"]
    rng = np.random.default_rng(args.seed)
    table: dict[bytes, np.ndarray] = defaultdict(lambda: np.full(env.action_space.n, args.highest))
    state = env.reset(seed=args.seed)[0].tobytes()
    starts = {state}
    returns = []
    total = 0.0
    discount = 1.0
    print(f"V* = {optimum.value:.4f}; tokens, V of the prompts, J of the last 100 episodes:")
    for step in range(1, args.steps + 1):
        q = table[state]
        log_probs = (q - soft_value(q, kl_coef)) / kl_coef
        action = int(rng.choice(len(q), p=np.exp(log_probs)))
        obs, reward, terminated, truncated, _ = env.step(action)
        state = obs.tobytes()
        q[action] = reward + (0.0 if terminated else gamma * soft_value(table[state], kl_coef))
        total += discount * (reward - kl_coef * log_probs[action])
        discount *= gamma
        if terminated or truncated:
            returns.append(total)
            state = env.reset()[0].tobytes()
            total = 0.0
            discount = 1.0
            starts.add(state)
        if step % (max(args.steps // 6, 1)) == 0:
            value = np.mean([soft_value(table[start], kl_coef) for start in starts])
            print(f"{step:>7}  {value:.4f}  {np.mean(returns[-100:]):.4f}")
