"""Discrete SAC, off-policy, on keyword-8: with the temperature `kl_coef`, its own objective is J.

    python examples/discrete_sac.py --steps 40000 --seed 0

SAC maximises the sum of r_t + alpha * entropy of pi(.|s_t) (Haarnoja et al. 2018; Christodoulou 2019 for finite
actions). The env's r_t has kl_coef * log pi_ref(a|s). At alpha = kl_coef the sum is J.
"""

import argparse

import gymnasium as gym
import torch
from torch import nn

from lmgym.sb3 import evaluate


def make(rows: int, split: str) -> gym.vector.VectorEnv:
    settings = {"split": split, "obs_format": "onehot", "autoreset_mode": "SameStep", "device": "cpu"}
    return gym.make_vec("lmgym:lmgym/Keyword-8-v0", num_envs=rows, **settings)


def train(envs: gym.vector.VectorEnv, steps: int, seed: int, batch: int = 256, tau: float = 0.01) -> nn.Module:
    alpha = envs.unwrapped.kl_coef
    gamma = envs.unwrapped.gamma
    size = envs.single_observation_space.shape[0]
    mlp = lambda: nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, envs.single_action_space.n))  # noqa: E731
    actor = mlp()
    critic = mlp()
    target = mlp()
    target.requires_grad_(False).load_state_dict(critic.state_dict())
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()])
    rounds = steps // envs.num_envs
    state = torch.from_numpy(envs.reset(seed=seed)[0])
    buffer = []
    for i in range(rounds):
        action = torch.distributions.Categorical(logits=actor(state)).sample()
        after, reward, ended = (torch.from_numpy(x).float() for x in envs.step(action.numpy())[:3])
        buffer.append((state, action, reward, after, ended))
        state = after
        rows = [buffer[j] for j in torch.randint(len(buffer), (batch // envs.num_envs,)).tolist()]
        s, a, r, s_after, end = (torch.cat(column) for column in zip(*rows, strict=True))
        with torch.no_grad():
            log_probs = actor(s_after).log_softmax(-1)
            wanted = r + gamma * (1 - end) * (log_probs.exp() * (target(s_after) - alpha * log_probs)).sum(-1)
        q = critic(s)
        log_probs = actor(s).log_softmax(-1)
        error = nn.functional.mse_loss(q.gather(1, a[:, None]).squeeze(1), wanted)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - i / rounds)  # falls to 0, so that the last policy is steady
        optimizer.zero_grad()
        (error + (log_probs.exp() * (alpha * log_probs - q.detach())).sum(-1).mean()).backward()
        optimizer.step()
        torch._foreach_lerp_(list(target.parameters()), list(critic.parameters()), tau)
    return actor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Discrete SAC on keyword-8, graded by J")
    parser.add_argument("--steps", type=int, default=40_000, help="tokens to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    grade = evaluate(train(make(16, "train"), args.steps, args.seed), make(256, "test"), samples=256)
    share = grade.normalised
    print(f"J {grade.metrics['return'].mean:+.4f}, normalised {share.mean:.3f} [{share.low:.3f}, {share.high:.3f}]")
