"""Natural language policy optimisation (Ramamurthy et al. 2023): PPO over the likely tokens of an earlier policy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from agents.algorithms.ppo import PPO, PPOConfig
from agents.batch import Batch
from agents.policies.actor_critic import MaskedState, Read, TrainablePolicy, read_logits
from agents.policies.choice import make_policy
from lmgym.episodes import Episodes
from lmgym.models.sampling import Sampler
from lmgym.ranges import Count, PositiveFraction


@dataclass(frozen=True)
class NLPOConfig(PPOConfig):
    """NLPO's own numbers."""

    mask_top_p: PositiveFraction = 0.9  # mass of the mask policy's likeliest tokens, the only ones allowed; 1 is PPO
    mask_update_every: Count = 5  # batches between copies of the policy into the mask policy


class NLPO(PPO):
    """PPO with probability 0 off the top-p set of a mask policy, which is a copy of the policy every few batches."""

    Config = NLPOConfig
    config: NLPOConfig
    policy: MaskedPolicy
    carried = ("batches",)
    batches = 0  # since the start

    def new_policy(self, seed: int) -> MaskedPolicy:
        """The policy and its mask policy, both the reference at first."""
        mask = make_policy(self.envs, self.config, seed)
        return MaskedPolicy(super().new_policy(seed), mask, self.config.mask_top_p)

    @property
    def unmasked(self) -> TrainablePolicy:
        """The policy over all tokens."""
        return self.policy.policy

    def update(self, batch: Batch) -> dict[str, float]:
        """PPO's; every few batches the mask policy then follows the policy."""
        metrics = super().update(batch)
        self.batches += 1
        if self.batches % self.config.mask_update_every == 0:
            self.policy.refresh()
        return metrics

    def start_log_probs(self, episodes: Episodes) -> Tensor:
        """(B, T) log-probs of the reference over its own likeliest tokens, as which the policy starts."""
        device = self.policy.device
        start = torch.zeros_like(episodes.log_probs)
        for rows in torch.arange(len(episodes)).split(self.config.micro_batch_size):
            few = episodes[rows].to(device)
            logits = read_logits(self.envs.engine.lm, few)
            chosen = few.response_ids[few.response_mask].unsqueeze(1)
            log_distribution = mask_to_top_p(logits, logits, self.config.mask_top_p, chosen).float().log_softmax(-1)
            part = torch.zeros_like(few.log_probs)
            part[few.response_mask] = log_distribution.gather(1, chosen).squeeze(1)
            start[rows] = part.to(start.device)
        return start


def mask_to_top_p(logits: Tensor, mask_logits: Tensor, top_p: float, chosen: Tensor | None = None) -> Tensor:
    """Logits with -inf off the smallest set of the mask's likeliest tokens whose mass reaches `top_p`.

    Args:
        logits: (n, V). mask_logits: (n, V).
        chosen: (n, 1) tokens drawn from that set: they stay, where rounding would have one on its edge fall out.

    Returns:
        (n, V); differentiable in `logits`.
    """
    out = Sampler(top_p=top_p).adjust_logits(mask_logits.detach(), 0) == -torch.inf
    if chosen is not None:
        out = out.scatter(1, chosen, False)
    return logits.masked_fill(out, -torch.inf)


class MaskedPolicy(TrainablePolicy):
    """A policy over the top-p set of another, the mask policy.

    Args:
        policy: what learns; its checkpoint is the unmasked one.
        mask: the mask policy, frozen here; of the same kind.
        top_p: mass of the set.
    """

    def __init__(self, policy: TrainablePolicy, mask: TrainablePolicy, top_p: float) -> None:
        super().__init__()
        self.policy = policy
        self.mask = mask.requires_grad_(False)
        self.top_p = top_p

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def dtype(self) -> torch.dtype:
        return self.policy.dtype

    def models(self) -> list[nn.Module]:
        return [*self.policy.models(), *self.mask.models()]

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> MaskedState:
        prompts = (prompt_ids, prompt_mask, max_new_tokens)
        mask_logits = partial(mask_to_top_p, top_p=self.top_p)
        return MaskedState(self.policy.begin(*prompts), self.mask.begin(*prompts), mask_logits)

    def read_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Read:
        return self._masked(self.policy.read_at(ids, rows, columns), self.mask.read_at(ids, rows, columns))

    def read(self, episodes: Episodes) -> Read:
        """Logits and values at every chosen token, which itself is never off the support; differentiable."""
        chosen = episodes.response_ids[episodes.response_mask].unsqueeze(1)
        with torch.no_grad():
            mask = self.mask.read(episodes)
        return self._masked(self.policy.read(episodes), mask, chosen)

    def _masked(self, own: Read, mask: Read, chosen: Tensor | None = None) -> Read:
        return Read(mask_to_top_p(own.logits, mask.logits, self.top_p, chosen), own.values, own.hidden)

    @property
    def has_graphs(self) -> bool:
        return self.policy.has_graphs

    def critic_parameters(self) -> list[nn.Parameter]:
        return self.policy.critic_parameters()

    def refresh(self) -> None:
        """Copies the policy into the mask policy, but for its critic."""
        critic = {id(parameter) for parameter in self.policy.critic_parameters()}
        state = self.policy.state_dict(keep_vars=True)
        weights = {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in critic}
        self.mask.load_state_dict(weights, strict=False)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the policy, and the mask policy into `mask/`."""
        self.policy.save(directory)
        (Path(directory) / "mask").mkdir()
        self.mask.save(Path(directory) / "mask")

    def load(self, directory: str | os.PathLike[str]) -> None:
        self.policy.load(directory)
        self.mask.load(Path(directory) / "mask")
