"""Agents that do not learn: what the others are measured against.

Shapes: B rows, P prompt columns, T response columns, L = P + T, V vocabulary.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import TokenCount, replacing
from agents.on_policy import Callback, check_dict_observations
from agents.seeds import ACTIONS, torch_generator
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler, check_finite_log_probs


@dataclass(frozen=True)
class FixedConfig:
    """Nothing to choose."""

    num_envs: ClassVar[int] = 1


class FixedAgent(ABC):
    """Acts, and takes no step of training.

    Args:
        envs: the token MDP.
        config: the agent's own numbers, if it has any.
        seed: of the tokens drawn.
        sampler: the law that they are drawn from, given logits; the logits' own if None.

    Attributes:
        num_timesteps: tokens that were sampled to learn, or to choose from: none where a policy is merely followed.
        tokens: what was read for that.
    """

    Config: ClassVar[type[FixedConfig]] = FixedConfig

    def __init__(
        self, envs: RLHFVectorEnv, config: FixedConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        check_dict_observations(envs)
        self.envs, self.config, self.sampler = envs, config or self.Config(), sampler or Sampler()
        self.seed = seed
        self.generator = torch_generator(seed, ACTIONS)
        self.num_timesteps, self.tokens = 0, TokenCount()

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:  # noqa: B027 - all there is to do
        """There is nothing to learn, and no step is taken."""

    @abstractmethod
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Tokens for a (batched or single) dict observation, as SB3's `predict`: (actions, None)."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what the sampling goes on from; what the agent does is derived again."""
        with replacing(directory) as scratch:
            self.write(scratch)

    def write(self, directory: Path) -> None:
        """Writes the files of a checkpoint into an empty directory."""
        state = {"seed": self.seed, "num_timesteps": self.num_timesteps, "tokens": asdict(self.tokens)}
        state["generator"] = self.generator.get_state().tolist()
        (directory / "state.json").write_text(json.dumps(state))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what `save` wrote."""
        state = json.loads((Path(directory) / "state.json").read_text())
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.seed, self.num_timesteps = state["seed"], state["num_timesteps"]
        self.tokens = TokenCount(**state["tokens"])


class FixedPolicyAgent(FixedAgent):
    """Follows a policy that is given."""

    def __init__(
        self, envs: RLHFVectorEnv, config: FixedConfig | None = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self.policy = self.make_policy()

    @abstractmethod
    def make_policy(self) -> Policy:
        """What is followed."""

    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Tokens for a (batched or single) dict observation, as SB3's `predict`: (actions, None)."""
        horizon = self.envs.engine.horizon
        return act(self.policy, observation, horizon, self.sampler, self.generator, deterministic), None


@torch.inference_mode()
def act(
    policy: Policy,
    observation: dict[str, Any],
    horizon: int,
    sampler: Sampler,
    generator: torch.Generator,
    deterministic: bool = False,
) -> Any:
    """The next token of each row of an observation, its response followed by the policy from the prompt.

    Args:
        policy: any that there is.
        observation: (B, L) `input_ids` and `attention_mask`, or (L,) for one row.
        horizon: T.
        sampler: the law that tokens are drawn from, given the policy's logits.
        generator: a CPU generator; B uniforms are drawn from it.
        deterministic: the likeliest token instead, and nothing is drawn.

    Returns:
        (B,) int64 array, or () for one row.
    """
    ids, mask = (torch.from_numpy(np.atleast_2d(observation[key])) for key in ("input_ids", "attention_mask"))
    lengths = mask[:, -horizon:].sum(1)
    logits = _next_logits(policy, ids.to(policy.device), mask.bool().to(policy.device), lengths, horizon).cpu()
    actions = logits.argmax(-1)
    if not deterministic:
        uniforms = torch.rand(len(ids), generator=generator, dtype=torch.float64)
        for t in lengths.unique().tolist():
            rows = lengths == t
            actions[rows], log_probs = sampler.sample(logits[rows], t, uniforms[rows])
            check_finite_log_probs(log_probs)
    chosen = actions.numpy()
    return chosen[0] if np.ndim(observation["input_ids"]) == 1 else chosen


def _next_logits(policy: Policy, ids: Tensor, mask: Tensor, lengths: Tensor, horizon: int) -> Tensor:
    """(B, V) logits behind responses of `lengths` (B,) tokens, stepped along side by side."""
    width = ids.shape[1] - horizon
    state = policy.begin(ids[:, :width], mask[:, :width], horizon)
    logits = state.logits.clone()
    for t in range(int(lengths.max())):
        state.step(ids[:, width + t])
        here = (lengths == t + 1).to(logits.device)
        logits[here] = state.logits[here]
    return logits
