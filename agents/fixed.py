"""Agents that do not learn: what the others are measured against."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from agents.agent import Agent, AgentConfig, Callback, PolicyAgent, TokenCount
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler


@dataclass(frozen=True)
class FixedConfig(AgentConfig):
    """Nothing to choose."""


class FixedAgent(Agent):
    """Acts, and takes no step of training.

    Attributes:
        num_timesteps: tokens that were sampled to learn, or to choose from: none where a policy is merely followed.
        tokens: what was read for that.
    """

    Config: ClassVar[type[FixedConfig]] = FixedConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: Any = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self.seed = seed

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """There is nothing to learn, and no step is taken."""

    def write(self, directory: Path) -> None:
        """Writes what the sampling goes on from; what the agent does is derived again."""
        state = {"seed": self.seed, "num_timesteps": self.num_timesteps, "tokens": asdict(self.tokens)}
        state["generator"] = self.generator.get_state().tolist()
        (directory / "state.json").write_text(json.dumps(state))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what `save` wrote."""
        state = json.loads((Path(directory) / "state.json").read_text())
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.seed = state["seed"]
        self.num_timesteps = state["num_timesteps"]
        self.tokens = TokenCount(**state["tokens"])


class FixedPolicyAgent(PolicyAgent, FixedAgent):
    """Follows a policy that is given."""

    def __init__(
        self, envs: RLHFVectorEnv, config: Any = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self.policy = self.make_policy()

    @abstractmethod
    def make_policy(self) -> Policy:
        """The policy to follow."""
