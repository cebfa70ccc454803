"""A reference that drifts: the KL is paid to an average or a copy of the policy, and graded against the true one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agents.batch import recompute
from agents.faults.config import REFERENCE_DRIFT, parse_setting
from agents.faults.fault import Fault, Learner
from agents.faults.swapping import swapped
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.sampling import Sampler


class ReferenceDrift(Fault):
    """The reference log-probs that are learned from are those of earlier weights of the policy.

    Before the first update these are the reference's own. The exact KL in a loss reads the reference itself, would not
    see the drift, and is refused.

    Args:
        setting: "ema:DECAY", w <- DECAY w + (1 - DECAY) policy after each update; or "copy:K", a copy of the policy
            after each K updates.
    """

    key = "reference_drift"

    def __init__(self, setting: str) -> None:
        super().__init__()
        self._kind, self._number = parse_setting(self.key, setting, REFERENCE_DRIFT)
        self._weights: list[Tensor] = []
        self._updates = 0

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        if learner.envs.kl_coef == 0:
            raise InvalidArgumentError(f"`{self.key}` must be null where `kl_coef` is 0: no reference is asked.")
        if getattr(learner.config, "kl_estimator", None) == "exact":
            raise InvalidArgumentError(
                f"`{self.key}` must be null with `kl_estimator=exact`, which reads the reference."
            )
        self._weights = self._policy()

    def tell(self, episodes: Episodes) -> Episodes:
        learner = self.learner
        mask = episodes.response_mask
        with swapped(learner.policy.policy_parameters(), self._weights):
            again = recompute(learner.policy, Sampler(), episodes, learner.config.micro_batch_size).episodes
        drift = (again.log_probs - episodes.ref_log_probs)[mask].abs().mean().item()
        self.metrics = {"train/reference_gap": drift}
        return replace(episodes, ref_log_probs=again.log_probs)

    def finish_update(self) -> None:
        self._updates += 1
        if self._kind == "ema":
            pairs = zip(self._weights, self._policy(), strict=True)
            self._weights = [self._number * old + (1 - self._number) * new for old, new in pairs]
        elif self._updates % self._number == 0:
            self._weights = self._policy()

    def _policy(self) -> list[Tensor]:
        """A copy of the weights that learn, in float32."""
        return [p.detach().to(torch.float32, copy=True) for p in self.learner.policy.policy_parameters()]

    def state(self) -> dict[str, Any]:
        return {"updates": self._updates, **{str(i): x.cpu() for i, x in enumerate(self._weights)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._updates = state["updates"]
        device = self.learner.policy.device
        self._weights = [state[str(i)].to(device) for i in range(len(state) - 1)]
