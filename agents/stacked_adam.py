"""Adam on the stacked weights of S seeds: each seed has the step that its own optimiser would take.

Shapes: S seeds, N numbers that a seed's weights have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agents.policies.actor_critic import TrainablePolicy
from agents.policies.stacked import StackedPolicy
from agents.update import Updater


class StackedAdam:
    """Steps a stack's weights; moments and counts of steps are taken from the seeds' optimisers, and given back.

    Args:
        policy: the stack.
        policies: what it was made of. updaters: theirs.
        uses_critic: whether the numbers that values alone depend on are stepped too.
    """

    def __init__(
        self,
        policy: StackedPolicy,
        policies: Sequence[TrainablePolicy],
        updaters: Sequence[Updater],
        uses_critic: bool,
    ) -> None:
        self._policy = policy
        self._updaters = updaters
        self._ordered = [policy.ordered(each) for each in policies]
        self._adam = updaters[0].adam
        self._first = torch.stack([self._moments(seed, "exp_avg") for seed in range(len(updaters))])
        self._second = torch.stack([self._moments(seed, "exp_avg_sq") for seed in range(len(updaters))])
        self._steps = [self._count(seed) for seed in range(len(updaters))]
        total = policy.weights.shape[1]
        actor = total - policy.critic_size
        self._stepped = {
            id(weight)
            for each in updaters
            for group in each.optimizer.param_groups[: 2 if uses_critic else 1]
            for weight in group["params"]
        }
        self._spans = [slice(0, actor), slice(actor, total)][: 2 if uses_critic else 1]

    def clip(self, gradients: Tensor) -> Tensor:
        """Scales gradients (S, N) down, each seed's to the largest norm there may be; returns the norms before (S,)."""
        norms = gradients.norm(dim=1)
        limit = self._adam.max_grad_norm or math.inf
        gradients.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None])
        return norms

    @torch.no_grad()
    def step(self, gradients: Tensor) -> None:
        """One step of Adam (Kingma & Ba 2015, algorithm 1) down gradients (S, N), at the updaters' learning rates."""
        beta1, beta2 = self._adam.betas
        self._steps = [count + 1 for count in self._steps]
        self._first.lerp_(gradients, 1 - beta1)
        self._second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        roots = [math.sqrt(1 - beta2**count) for count in self._steps]
        epsilons = [self._adam.eps / (root if self._adam.is_tensorflow else 1.0) for root in roots]
        denominators = self._second.sqrt().div_(self._column(roots)).add_(self._column(epsilons))
        for group, span in enumerate(self._spans):
            rates = [updater.optimizer.param_groups[group]["lr"] for updater in self._updaters]
            sizes = [rate / (1 - beta1**count) for rate, count in zip(rates, self._steps, strict=True)]
            change = self._first[:, span] / denominators[:, span]
            self._policy.weights[:, span].sub_(change.mul_(self._column(sizes)))

    @torch.no_grad()
    def copy_back(self) -> None:
        """Gives the seeds' optimisers the moments and counts of steps that are here."""
        for seed, updater in enumerate(self._updaters):
            if not self._steps[seed]:
                continue
            both = (self._policy.split(x[seed]) for x in (self._first, self._second))
            for weight, first, second in zip(self._ordered[seed], *both, strict=True):
                if id(weight) in self._stepped:
                    state = {
                        "step": self._as_step(seed, weight),
                        "exp_avg": first.clone(),
                        "exp_avg_sq": second.clone(),
                    }
                    updater.optimizer.state[weight] = state

    def _as_step(self, seed: int, weight: Tensor) -> Tensor:
        is_fused = self._updaters[seed].optimizer.defaults["fused"]
        return torch.tensor(float(self._steps[seed]), device=weight.device if is_fused else "cpu")

    def _moments(self, seed: int, name: str) -> Tensor:
        """(N,) of a seed, 0 where its optimiser has taken no step yet."""
        state = self._updaters[seed].optimizer.state
        parts = [state[weight][name] if weight in state else torch.zeros_like(weight) for weight in self._ordered[seed]]
        return torch.cat([part.detach().flatten() for part in parts])

    def _count(self, seed: int) -> int:
        state = self._updaters[seed].optimizer.state
        return max((int(each["step"]) for each in state.values()), default=0)

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, device=self._first.device)[:, None]
