"""A sampler that is not what the trainer believes: another temperature, fewer tokens, or coarser numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agents.faults.config import SAMPLER_MISMATCH, parse_setting
from agents.faults.fault import Fault, Learner
from agents.faults.swapping import swapped
from lmgym.errors import InvalidArgumentError
from lmgym.models.sampling import Sampler


@dataclass(frozen=True)
class RoundedSampler(Sampler):
    """A sampler that is given logits in bfloat16, as an inference engine computes them."""

    def adjust_logits(self, logits: Tensor, t: int) -> Tensor:
        return super().adjust_logits(logits.bfloat16(), t)


class SamplerMismatch(Fault):
    """Tokens are drawn from another distribution than the one that is trained and graded.

    An episode's log-probs are those that its tokens were drawn with. An update starts from these, or from those of the
    trainer, as `recompute_log_probs` says.

    Args:
        setting: "temperature:1.1", "top_k:16" or "top_p:0.9", instead of the agent's own; "bfloat16" rounds the weights
            that learn and the logits to bfloat16 while they sample. What is between these stays in the policy's type.
    """

    key = "sampler_mismatch"
    trips = frozenset({"start", "ratio"})

    def __init__(self, setting: str) -> None:
        super().__init__()
        self._setting = setting
        self._name, self._value = parse_setting(self.key, setting, SAMPLER_MISMATCH)

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        if self.change_sampler(learner.sampler) == learner.sampler:
            raise InvalidArgumentError(
                f"`{self.key}` must be another distribution than that of the run, got {self._setting!r}, which is it."
            )

    def change_sampler(self, sampler: Sampler) -> Sampler:
        if self._name == "bfloat16":
            return RoundedSampler(sampler.temperature, sampler.top_k, sampler.top_p, sampler.greedy_tokens)
        return replace(sampler, **{self._name: self._value})

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        if self._name != "bfloat16":
            yield
            return
        parameters = self.learner.policy.policy_parameters()
        with swapped(parameters, [p.detach().to(torch.bfloat16) for p in parameters]):
            yield
