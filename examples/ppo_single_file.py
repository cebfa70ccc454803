"""PPO in a single file, in the manner of CleanRL: the vector env, a small network, GAE and the clipped loss.

    python examples/ppo_single_file.py --steps 150000

`VectorPolicyKL` pays the policy's half of the KL, so the rewards add up to J. The network's output is added to the
logits of the reference, and its last layer starts at 0. So training starts from the reference, at KL 0.
"""

import argparse
from typing import Any

import gymnasium as gym
import torch
from torch import nn
from torch.distributions import Categorical

import lmgym
from lmgym.wrappers import VectorPolicyKL

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PPO on lmgym/Echo-4-v0")
    parser.add_argument("--steps", type=int, default=150_000, help="tokens to train on")
    updates = parser.parse_args().steps // 1024  # 256 prompts, one a row, and 4 tokens each
    torch.manual_seed(0)
    make: Any = {"prompt_order": "sequential", "obs_format": "flat", "autoreset_mode": "SameStep", "device": "cpu"}
    envs: Any = VectorPolicyKL(gym.make_vec("lmgym/Echo-4-v0", num_envs=256, **make))
    optimum = lmgym.solve("echo-4", split="train")
    size = int(envs.unwrapped.single_action_space.n)
    head = nn.Linear(256, 1 + size, bias=False)  # the value, and what is added to the logits
    nn.init.zeros_(head.weight)
    network = nn.Sequential(nn.Embedding(size + 1, 16), nn.Flatten(), nn.LazyLinear(256), nn.Tanh(), head)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for update in range(updates + 1):
        obs, _ = envs.reset()
        alive = torch.ones(256, dtype=torch.bool)
        steps = []
        for _ in range(4):  # a row that has ended goes on; `alive` leaves it out
            state = torch.from_numpy(obs) + 1
            reference = torch.from_numpy(envs.unwrapped.reference_log_probs())
            out = network(state).detach()
            distribution = Categorical(logits=reference + out[:, 1:])
            log_prob = distribution.log_prob(action := distribution.sample())
            obs, reward, terminated, *_ = envs.step({"token": action.numpy(), "log_prob": log_prob.numpy()})
            steps.append((state, reference, action, log_prob, out[:, 0], torch.from_numpy(reward).float(), alive))
            alive = alive & ~torch.from_numpy(terminated)
        *kept, values, rewards, alive = (torch.stack(column) for column in zip(*steps, strict=True))  # (4, 256, ...)
        if update % max(updates // 5, 1) == 0:
            share = ((rewards * alive).sum(0).mean() - optimum.reference) / (optimum.value - optimum.reference)
            print(f"{update * 1024:>7} tokens: normalised return {share:.3f} (0 is the reference, 1 is V*)")
        advantages = torch.zeros_like(values)
        last = torch.zeros(256)
        following = torch.zeros(256)
        for t in reversed(range(4)):  # GAE at gamma = 1, lambda = 0.95
            last = alive[t] * (rewards[t] - values[t] + following + 0.95 * last)
            advantages[t] = last
            following = alive[t] * values[t]
        batch = [x[alive] for x in (*kept, advantages, advantages + values)]
        for rows in torch.cat([torch.randperm(len(batch[0])) for _ in range(4)]).split(256):
            state, reference, action, before, advantage, target = (x[rows] for x in batch)
            out = network(state)
            ratio = (Categorical(logits=reference + out[:, 1:]).log_prob(action) - before).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean() / batch[4].std()
            optimiser.zero_grad()
            (0.5 * (out[:, 0] - target).square().mean() - gain).backward()
            optimiser.step()
