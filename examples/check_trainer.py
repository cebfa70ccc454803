"""A PPO in the manner of CleanRL, held to what the mathematics says.

    python examples/check_trainer.py

CleanRL's `dones` do not tell a time limit from an end. The report says so, and what of the functions is right.
"""

import argparse

import torch
from torch import Tensor

from lmgym.testing import GAEInputs, LossInputs, RewardInputs, TrainerAdapter, check_trainer


def compute_gae(rewards: Tensor, values: Tensor, dones: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """(T, N) advantages; `dones` (T + 1, N) is 1 where a step begins a new episode."""
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * following * (1 - dones[t + 1]) - values[t]
        last = delta + gamma * gae_lambda * (1 - dones[t + 1]) * last
        advantages[t] = last
        following = values[t]
    return advantages


def policy_loss(new_log_probs: Tensor, log_probs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """The clipped loss of flat tokens, a mean."""
    ratio = (new_log_probs - log_probs).exp()
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return losses.sum() / max(len(losses), 1)


def adapt_loss(inputs: LossInputs) -> Tensor:
    """Flattens the tokens of responses."""
    if inputs.parts > 1 or inputs.ranks > 1:
        raise NotImplementedError("a minibatch is read at once, in one process")
    mask = inputs.mask
    return policy_loss(inputs.log_probs[mask], inputs.old_log_probs[mask], inputs.advantages[mask])


def adapt_gae(inputs: GAEInputs) -> Tensor:
    """Turns responses into columns: what stands after a response begins a new episode."""
    ends = torch.nn.functional.pad((~inputs.mask).float(), (0, 1), value=1.0)
    with torch.no_grad():
        return compute_gae(inputs.rewards.T, inputs.values.T, ends.T, inputs.gamma, inputs.gae_lambda).T


def token_rewards(inputs: RewardInputs) -> Tensor:
    """The KL to the reference at every token, and the score at the last."""
    rewards = -inputs.kl_coef * (inputs.log_probs - inputs.ref_log_probs) * inputs.mask
    last = inputs.mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, inputs.scores.unsqueeze(1).to(rewards))


if __name__ == "__main__":
    argparse.ArgumentParser(description="Check a PPO in the manner of CleanRL").parse_args()
    adapter = TrainerAdapter(name="single-file PPO", loss=adapt_loss, gae=adapt_gae, token_rewards=token_rewards)
    report = check_trainer(adapter, raises=False)
    print(report)
    print("to look at:", ", ".join(report.failures))
