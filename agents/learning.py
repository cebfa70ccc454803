"""What the agents that change weights have in common: a policy, its optimiser, and a checkpoint to go on from."""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.agent import PolicyAgent, TokenCount
from agents.policies.actor_critic import TrainablePolicy
from agents.policies.choice import PolicyConfig, make_policy
from agents.seeds import WEIGHTS, row_seeds, stream_seed
from agents.update import Updater
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models.padding import compact_left
from lmgym.models.sampling import Sampler


@dataclass(frozen=True)
class LearningConfig(PolicyConfig, ABC):
    """What every agent has that changes weights."""

    @abstractmethod
    def new_updater(self, policy: TrainablePolicy) -> Updater:
        """The optimiser of a policy at the start of a run."""


class LearningAgent(PolicyAgent):
    """An agent that changes the weights of its policy.

    Args:
        envs: the token MDP with dict observations.
        config: the algorithm's numbers.
        seed: of the prompts, the tokens sampled, the order of examples and the weights that are drawn.
        sampler: how tokens are drawn, given the policy's logits.

    Attributes:
        policy: what learns.
        updater: its optimiser.
        at_rest: False while the weights change. Where the collecting of a batch fails, the agent is at rest, and `save`
            writes the state before that batch.
    """

    config: LearningConfig
    policy: TrainablePolicy

    def __init__(
        self, envs: RLHFVectorEnv, config: Any = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self.policy = self.new_policy(stream_seed(seed, WEIGHTS))
        self.updater = self.config.new_updater(self.policy)
        self._before_batch: dict[str, Any] | None = None  # the state there, while no weight has changed since
        envs.reset(seed=row_seeds(seed, envs.num_envs))

    def new_policy(self, seed: int) -> TrainablePolicy:
        """The policy at the start of a run; `seed` is of the weights that are drawn."""
        return make_policy(self.envs, self.config, seed)

    def next_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, V) logits of each row's next token, from one forward over (B, L) ids; mask (B, L) is True on tokens."""
        return self.policy.next_logits(compact_left(ids, mask), mask.sum(-1))

    def note_state(self) -> None:
        """Notes the state before a batch is collected: `save` writes that until the weights change."""
        self._before_batch = self.state()

    @contextlib.contextmanager
    def changing_weights(self) -> Iterator[None]:
        """The block in which a batch is learned from: where it fails, the agent is not at rest."""
        self._before_batch = None
        self.at_rest = False
        yield
        self.at_rest = True

    def state(self) -> dict[str, Any]:
        """What changes from batch to batch, but for the weights and what the optimiser knows of them.

        Tensors on the CPU, and JSON values.
        """
        return {
            "num_timesteps": self.num_timesteps,
            "tokens": asdict(self.tokens),
            "config": asdict(self.config),
            "env": self.envs.streams(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.num_timesteps = state["num_timesteps"]
        self.tokens = TokenCount(**state["tokens"])
        self.envs.set_state(state["env"])
        self.generator.set_state(state["generator"])

    def write(self, directory: Path) -> None:
        """Writes the policy, `training.pt` (optimiser and generator) and `state.json` into an empty directory."""
        self.updater.check()
        self.policy.save(directory)
        state = self._before_batch or self.state()
        tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
        values = {name: value for name, value in state.items() if name not in tensors}
        torch.save({"optimizer": self.updater.optimizer.state_dict(), **tensors}, directory / "training.pt")
        (directory / "state.json").write_text(json.dumps(values, default=np.ndarray.tolist))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote: the same curve as if there had been no break."""
        directory = Path(directory)
        self.policy.load(directory)
        tensors = torch.load(directory / "training.pt", weights_only=True, map_location=self.policy.device)
        self.updater.load_state_dict(tensors.pop("optimizer"))
        values = json.loads((directory / "state.json").read_text())
        self.restore({**values, **{name: tensor.cpu() for name, tensor in tensors.items()}})
        self._before_batch = None
        self.at_rest = True
