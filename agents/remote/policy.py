"""A policy whose weights are here and whose responses an engine draws.

Shapes: B prompts, T response columns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.policies.actor_critic import ActorCritic
from lmgym.ending import EndRule
from lmgym.models.causal import CausalLM
from lmgym.models.sampling import Sampler
from lmgym.remote.client import Client


class RemotePolicy:
    """Sends its weights to an engine before each batch: a `lmgym.models.policy.Responder`.

    Args:
        policy: that learns. client: of the engine. directory: by which weights go; the engine reads it too.

    Attributes:
        metrics: of the last batch.
    """

    def __init__(self, policy: ActorCritic, client: Client, directory: Path) -> None:
        self.client = client
        self.metrics: dict[str, float] = {}
        self._policy = policy
        self._directory = directory

    @property
    def device(self) -> torch.device:
        """Where the policy learns."""
        return self._policy.device

    def complete(
        self,
        lm: CausalLM,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        uniforms: Tensor,
        end_rule: EndRule[npt.NDArray[np.bool_]],
    ) -> tuple[Tensor, Tensor]:
        """A response to each of B prompts by the weights as they are (`Responder.complete`)."""
        started = time.perf_counter()
        self._policy.save_model(self._directory)
        self.client.load_weights(self._directory)
        self.metrics = {"time/push_seconds": time.perf_counter() - started}
        return self.client.complete(lm, prompts, sampler, uniforms, end_rule)
