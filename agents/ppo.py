"""`agents.algorithms.ppo`, under the name that it had before."""

from agents.algorithms.ppo import PPO, PPOConfig

__all__ = ["PPO", "PPOConfig"]
