"""Stale samples: an update learns from a batch of the policy of k updates ago, as in asynchronous training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from agents.faults.fault import Fault
from lmgym.episodes import Episodes


class Staleness(Fault):
    """A queue of k batches between the sampler and the trainer.

    Before the first update k + 1 batches are sampled, all by the policy of the start. From then on the batch of update
    i is of the policy after max(0, i - k) updates. Its log-probs are those of that policy. Its values are read anew,
    by the critic of today: that is the trainer's own. The k batches that wait at the end of a run are never learned
    from: they count as tokens read (`cost/forward_tokens`), and not as env steps.

    Args:
        updates: k.
    """

    key = "staleness"
    trips = frozenset({"ratio"})

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.updates = updates
        self._waiting: deque[Episodes] = deque()

    def choose(self, sample: Callable[[], Episodes]) -> Episodes:
        while len(self._waiting) <= self.updates:
            self._waiting.append(sample())
        episodes = self._waiting.popleft()
        return replace(episodes, values=None).with_tokenizer(getattr(episodes, "_tokenizer", None))

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i, episodes in enumerate(self._waiting):
            columns = {field.name: getattr(episodes, field.name) for field in fields(Episodes)}
            found |= {f"{i}.{name}": x.cpu() for name, x in columns.items() if x is not None}
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        self._waiting.clear()
        batches: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in state.items():
            number, _, name = key.partition(".")
            batches.setdefault(int(number), {})[name] = tensor
        tokenizer = self.learner.envs.engine.lm.tokenizer
        for i in sorted(batches):
            columns: dict[str, Any] = {field.name: batches[i].get(field.name) for field in fields(Episodes)}
            episodes = Episodes(**columns).to(self.learner.policy.device)
            self._waiting.append(episodes.with_tokenizer(tokenizer))
