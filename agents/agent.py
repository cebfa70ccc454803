"""What an agent is: the contract that the commands use, and how an agent that has a policy acts and is graded.

Shapes: B rows, P prompt columns, T response columns, L = P + T, V vocabulary.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import replacing
from agents.distributed import Processes
from agents.seeds import ACTIONS, torch_generator
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.evaluation import Evaluation, evaluate
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler, check_finite_log_probs
from lmgym.ranges import check_fields
from lmgym.rollout import collect

Callback = Callable[[int, dict[str, float]], bool | None]


@dataclass(frozen=True)
class AgentConfig:
    """The numbers of an agent; what they ask of the env is here.

    A field's type says what it may be (`lmgym.ranges`); a subclass checks what is between fields, after these.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def num_envs(self) -> int:
        """Rows that the vector env must have."""
        return 1

    @property
    def responses(self) -> int:
        """Responses to each prompt of a batch; more than one where an algorithm compares them."""
        return 1


@dataclass
class TokenCount:
    """Tokens that an agent's policy has read, prompts included: what a run costs on any machine.

    A token counts each time a pass goes over it; columns of padding do not count. A critic with a trunk of its own, the
    frozen reference inside a residual, and the mask policy of NLPO go along with their policy and are not counted
    again. What the env reads to compute rewards (reference and reward model) is not counted either: it is the same for
    every agent at equal env steps.

    Attributes:
        forward: in decoding, in updates, and where an update reads the reference itself.
        backward: in passes that take a gradient, once a gradient.
    """

    forward: int = 0
    backward: int = 0

    def read(self, episodes: Episodes, *, forward: int = 1, backward: int = 0) -> None:
        """Counts so many passes over every token of some episodes."""
        size = int(episodes.attention_mask.sum())
        self.forward += forward * size
        self.backward += backward * size

    def share(self, before: TokenCount, processes: Processes) -> None:
        """Counts what all processes have read since an earlier count, where each has counted its own."""
        read = processes.gather((self.forward - before.forward, self.backward - before.backward))
        self.forward = before.forward + sum(forward for forward, _ in read)
        self.backward = before.backward + sum(backward for _, backward in read)

    def metrics(self) -> dict[str, float]:
        """The sums so far, as metrics of a run."""
        return {"cost/forward_tokens": self.forward, "cost/backward_tokens": self.backward}


class Agent(ABC):
    """The contract: a command builds an agent, trains, saves, loads and grades it through nothing but this class.

    Args:
        envs: the token MDP with dict observations.
        config: the agent's numbers, a `Config`; its defaults if None.
        seed: of everything that the agent draws.
        sampler: how tokens are drawn, given a policy's logits; from softmax(logits) if None.

    Attributes:
        Config: the dataclass of the agent's numbers; `conf/agent/<name>.yaml` sets its fields.
        num_timesteps: env steps (sampled tokens) so far.
        tokens: what the policy has read for them.
        deterministic: whether the agent is certain of every token, whatever the sampler.
        knows_log_probs: whether the log-probs that `respond` gives are of the distribution that it answers with.
        at_rest: whether a run that goes on from what `save` would write now gives the same curve.
        generator: what the agent draws from.
        processes: that train this agent together; this one alone at first (`agents.runs.sharing.share`).

    Raises:
        InvalidArgumentError: for an env with flat observations.
    """

    Config: ClassVar[type[AgentConfig]] = AgentConfig
    num_timesteps: int = 0
    deterministic: bool = False
    knows_log_probs: bool = True
    at_rest: bool = True
    processes: Processes = Processes()

    def __init__(
        self, envs: RLHFVectorEnv, config: Any = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        check_dict_observations(envs)
        self.envs = envs
        self.config = self.Config() if config is None else config
        self.sampler = sampler or Sampler()
        self.tokens = TokenCount()
        self.generator = torch_generator(seed, ACTIONS)

    @property
    def name(self) -> str:
        """What a report calls the agent."""
        return type(self).__name__

    @abstractmethod
    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `num_timesteps` is `total_timesteps` or more.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: gets (num_timesteps, metrics) after every batch; training stops if it returns False.
        """

    @abstractmethod
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Chooses the next token of each row, as the `predict` of Stable-Baselines3 does.

        Args:
            observation: `input_ids` and `attention_mask`, (B, L), or (L,) for one row.
            deterministic: the likeliest token; nothing is drawn.

        Returns:
            (B,) int64 array, or one number for one row; and None.
        """

    @abstractmethod
    def evaluate(
        self,
        envs: RLHFVectorEnv,
        *,
        samples: int = 8,
        prompts: int | None = None,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Evaluation:
        """Grades the agent on every prompt of an env's split, or on the first `prompts` of them.

        Args:
            envs: the MDP and its split.
            samples: episodes a prompt.
            prompts: how many prompts; None is all.
            sampler: how tokens are drawn; the agent's own if None.
            generator: a CPU generator; the agent's own if None.
            progress: called with the number of episodes of every batch that has been sampled.
        """

    @abstractmethod
    def respond(
        self,
        envs: RLHFVectorEnv,
        prompts: Sequence[Prompt],
        *,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
    ) -> Episodes:
        """Answers prompts: one whole episode each, on the CPU.

        Args:
            envs: the MDP, whose own rows and stream of prompts are not touched.
            prompts: B, one as often as it is to be answered.
            sampler: how tokens are drawn; the agent's own if None.
            generator: a CPU generator; the agent's own if None.
        """

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what a resumed run needs, under a temporary name first.

        `AutoModelForCausalLM` loads a fine-tuned policy; a residual is no model of its own.

        Raises:
            NotFiniteError: for weights or moments that are not finite; what was there before stays.
        """
        with replacing(directory) as scratch:
            self.write(scratch)

    @abstractmethod
    def write(self, directory: Path) -> None:
        """Writes the files of a checkpoint into an empty directory."""

    @abstractmethod
    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads what `save` wrote, and goes on from there: to the same curve as if there had been no break."""


class PolicyAgent(Agent):
    """An agent that chooses token by token, by a policy.

    Attributes:
        policy: what chooses; `lmgym.evaluation.evaluate` and `lmgym.rollout.collect` take it.
    """

    policy: Policy

    @torch.inference_mode()
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Chooses the next token of each row, as the `predict` of Stable-Baselines3 does (`Agent.predict`)."""
        device = self.policy.device
        ids = torch.as_tensor(np.atleast_2d(observation["input_ids"]), device=device)
        mask = torch.as_tensor(np.atleast_2d(observation["attention_mask"]), device=device).bool()
        logits = self.next_logits(ids, mask)
        tokens = logits.argmax(-1)
        if not deterministic:
            positions = mask[:, -self.envs.unwrapped.engine.horizon :].sum(1)
            uniforms = torch.rand(len(ids), generator=self.generator, dtype=torch.float64)
            for t in positions.unique().tolist():
                rows = positions == t
                tokens[rows], log_probs = self.sampler.sample(logits[rows], t, uniforms[rows.cpu()])
                check_finite_log_probs(log_probs, logits.dtype)
        actions = tokens.cpu().numpy()
        return (actions if np.ndim(observation["input_ids"]) == 2 else actions[0]), None

    def next_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, V) logits of each row's next token; the policy follows the responses from their prompts.

        Args:
            ids: (B, L) int64. mask: (B, L) bool, True on tokens.
        """
        horizon = self.envs.unwrapped.engine.horizon
        width = ids.shape[1] - horizon
        lengths = mask[:, width:].sum(1)
        state = self.policy.begin(ids[:, :width], mask[:, :width], horizon)
        logits = state.logits.clone()
        for t in range(int(lengths.max())):
            state.step(ids[:, width + t])
            rows = (lengths == t + 1).to(logits.device)
            logits[rows] = state.logits[rows]
        return logits

    def respond(
        self,
        envs: RLHFVectorEnv,
        prompts: Sequence[Prompt],
        *,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
    ) -> Episodes:
        """Answers prompts with the policy (`Agent.respond`)."""
        return collect(envs, self.policy, list(prompts), sampler or self.sampler, generator or self.generator)

    def evaluate(
        self,
        envs: RLHFVectorEnv,
        *,
        samples: int = 8,
        prompts: int | None = None,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Evaluation:
        """Grades the policy by `lmgym.evaluation.evaluate`, without sampling where that is possible."""
        return evaluate(
            self.policy,
            envs,
            samples=samples,
            prompts=prompts,
            sampler=sampler or self.sampler,
            generator=generator or self.generator,
            exact=True,
            progress=progress,
        )


def check_dict_observations(envs: RLHFVectorEnv) -> None:
    """Raises `InvalidArgumentError` for an env with flat observations, which `predict` does not take."""
    if envs.unwrapped.settings.obs_format != "dict":
        raise InvalidArgumentError(f"`obs_format` must be 'dict', got {envs.unwrapped.settings.obs_format!r}.")
