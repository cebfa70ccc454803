"""What an unchanged library optimises, and how it gets to J: Stable-Baselines3's PPO with an MLP on keyword-8.

    python examples/sb3_ppo_mlp.py --steps 100000 --seed 0

The env's reward has one half of the KL, `kl_coef * log pi_ref(a|s)`. Without the other half, PPO maximises the score
less kl_coef times the cross-entropy to the reference. The optimum of that is certain of every token. `PolicyKLCallback`
adds the other half, and then the optimum is pi*. Both are graded by J, on the scale of V*: 0 is the reference, 1 the
optimum.
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import torch
from stable_baselines3 import PPO

import lmgym  # noqa: F401 - registers the environments
from lmgym.sb3 import PolicyKLCallback, VecEnvBridge, evaluate


def make(rows: int, split: str) -> gym.vector.VectorEnv:
    """The whole state as a vector, so that an MLP can tell states apart."""
    settings = {"obs_format": "onehot", "autoreset_mode": "SameStep", "device": "cpu"}
    return gym.make_vec("lmgym/Keyword-8-v0", num_envs=rows, split=split, **settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stable-Baselines3's PPO on lmgym/Keyword-8-v0, graded by J")
    parser.add_argument("--steps", type=int, default=100_000, help="tokens to train on")
    parser.add_argument("--samples", type=int, default=256, help="episodes a prompt to grade on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # small networks: threads only wait for each other
    rate = lambda remaining: 3e-3 * remaining  # noqa: E731 - falls to 0, so that the last policy is steady
    options = {"learning_rate": rate, "n_steps": 32, "batch_size": 512, "n_epochs": 4, "gae_lambda": 0.95}
    for name, callback in (("the env's reward alone", None), ("with PolicyKLCallback", PolicyKLCallback())):
        model = PPO("MlpPolicy", VecEnvBridge(make(64, "train")), gamma=1.0, seed=args.seed, device="cpu", **options)
        model.learn(args.steps, callback=callback)
        grade = evaluate(model, make(args.samples, "test"), samples=args.samples, seed=args.seed)
        j = grade.metrics["return"].mean
        kl = grade.metrics["kl"].mean
        share = grade.normalised
        interval = f"[{share.low:.3f}, {share.high:.3f}]"
        print(f"{name}: J {j:+.4f}, KL {kl:.3f}, normalised {share.mean:.3f} {interval}")
