"""Path consistency learning (Nachum et al. 2017): KLQ's regression, on a replay of earlier episodes.

Policy and critic are one action-value function, Q(s, a) = V(s) + kl_coef * log(pi(a|s) / pi_ref(a|s)), as in KLQ. At
the optimum the errors of Q vanish along every path, whoever has chosen its tokens. So episodes of earlier policies are
as good as new ones, without importance weights, once their log-probs and values are those of the policy that learns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from agents.algorithms.klq import KLQ, KLQConfig
from agents.batch import Batch, recompute
from agents.on_policy import take_passes
from agents.update import average_steps
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.models.sampling import Sampler
from lmgym.models.transfer import to_device
from lmgym.ranges import Count

_SAVED_AS = "replay"


@dataclass(frozen=True)
class PCLConfig(KLQConfig):
    """PCL's own numbers."""

    replay: Count = 8  # newest batches that are learned from


class PCL(KLQ):
    """KLQ off-policy: every pass is over episodes drawn from the newest batches, read again before it."""

    Config = PCLConfig
    config: PCLConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: PCLConfig, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._replay: list[Episodes] = []  # the newest last

    def update(self, batch: Batch) -> dict[str, float]:
        """Passes of optimiser steps over as many episodes as a batch has, drawn anew for each."""
        self._replay = [*self._replay, batch.episodes][-self.config.replay :]
        history: list[dict[str, float]] = []
        for _ in range(self.config.epochs):
            drawn = self.read_again(self.draw(len(batch)), batch.progress)
            history += take_passes(self, drawn, 1)
        return average_steps(history) | {"train/replayed_episodes": float(sum(map(len, self._replay)))}

    def draw(self, count: int) -> Episodes:
        """So many of the episodes that are kept, each once at most, in their order."""
        kept = Episodes.concatenate(self._replay)
        rows = torch.randperm(len(kept), generator=self.generator)[:count].sort().values
        return kept[to_device(rows, self.policy.device)].with_tokenizer(self.envs.engine.lm.tokenizer)

    def read_again(self, episodes: Episodes, progress: float) -> Batch:
        """Episodes with the log-probs and values of the policy as it is, and the targets that follow from them."""
        again = recompute(self.policy, self.sampler, episodes, self.config.micro_batch_size).episodes
        self.tokens.read(again)
        advantages, returns = self.advantages(again, self.rewards(again))
        return Batch(again, advantages, returns, progress)

    def state(self) -> dict[str, Any]:
        """What changes from batch to batch, the episodes that are kept included."""
        kept = {
            f"{_SAVED_AS}.{i}.{field.name}": tensor.cpu()
            for i, episodes in enumerate(self._replay)
            for field in fields(Episodes)
            if (tensor := getattr(episodes, field.name)) is not None
        }
        return {**super().state(), **kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        super().restore(state)
        columns: dict[int, dict[str, Any]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            if kind == _SAVED_AS:
                number, field = rest.split(".")
                columns.setdefault(int(number), {"values": None})[field] = tensor.to(self.policy.device)
        self._replay = [Episodes(**columns[i]) for i in sorted(columns)]
