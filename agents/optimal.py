"""The optimal policy itself, on tasks where a solver can represent it: what every other agent is measured against."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.base import Callback
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.errors import InvalidArgumentError
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler
from lmgym.optimum import solve


@dataclass(frozen=True)
class OptimalConfig:
    """Nothing to choose."""

    num_envs: ClassVar[int] = 1


class Optimal:
    """Samples pi*(a|s) = pi_ref(a|s) exp((Q*(s, a) - V*(s)) / kl_coef) of a task that `lmgym.optimum.solve` can solve.

    Raises:
        InvalidArgumentError: if no solver represents the task's pi*.
    """

    Config: ClassVar[type[OptimalConfig]] = OptimalConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: OptimalConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        self.envs, self.config, self.sampler = envs, config or OptimalConfig(), sampler or Sampler()
        texts = tuple(dict.fromkeys(text for split in envs.task.prompts.values() for text in split))
        policy = solve(replace(envs.task, prompts={"all": texts}), split="all").policy
        if policy is None:
            raise InvalidArgumentError(f"`task` must be one whose optimal policy is known, got {envs.task.name!r}.")
        self.policy: Policy = policy
        self.generator = torch.Generator().manual_seed(seed)
        self.num_timesteps = 0

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """There is nothing to learn, and no step is taken."""

    @torch.inference_mode()
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Tokens for a (batched or single) dict observation, as SB3's `predict`: (actions, None)."""
        ids, mask = np.asarray(observation["input_ids"]), np.asarray(observation["attention_mask"]).astype(bool)
        single = ids.ndim == 1
        ids, mask = np.atleast_2d(ids), np.atleast_2d(mask)
        logits = self._logits(torch.from_numpy(ids), torch.from_numpy(mask))
        if deterministic:
            actions = logits.argmax(-1)
        else:
            uniforms = torch.rand(len(ids), generator=self.generator, dtype=torch.float64)
            actions, _ = Sampler().sample(logits, 0, uniforms)
        chosen = actions.numpy()
        return (chosen[0] if single else chosen), None

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, V) log pi* of the next token, each row followed from its prompt to where it stands."""
        horizon = self.envs.engine.horizon
        width = ids.shape[1] - horizon
        state = self.policy.begin(ids[:, :width], mask[:, :width], horizon)
        lengths = mask[:, width:].sum(1)
        logits = state.logits.clone()
        for t in range(int(lengths.max())):
            state.step(ids[:, width + t])
            logits[lengths == t + 1] = state.logits[lengths == t + 1]
        return logits

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what the sampling goes on from; the policy itself is derived again."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = {"generator": self.generator.get_state().tolist()}
        (directory / "state.json").write_text(json.dumps(state))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what `save` wrote."""
        state = json.loads((Path(directory) / "state.json").read_text())
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
