"""The template of an agent that fits examples: those of a file, or batches that it samples.

An algorithm is a config dataclass, `sample()`, `select()`, `part()`, `loss()` and `describe()`. The loop is the same
for all.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar, final

import torch
from torch import Tensor

from agents.agent import Callback
from agents.finite import check_weights
from agents.learning import LearningAgent, LearningConfig
from agents.policies.actor_critic import TrainablePolicy
from agents.update import AdamConfig, Loss, Updater
from lmgym.envs.engine import Engine
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import token_log_probs
from lmgym.models.padding import pad_right
from lmgym.models.sampling import Sampler
from lmgym.ranges import Count, NonNegative

Examples = TypeVar("Examples")


@dataclass(frozen=True)
class SupervisedConfig(LearningConfig):
    """What every agent has that fits examples."""

    batch_size: Count = 64  # examples an optimiser step
    epochs: Count = 1  # sampled: passes over each batch; file: over the file
    lr: NonNegative = 5e-4  # Adam's, at first
    lr_schedule: Literal["constant", "linear"] = "linear"  # linear ends at 0 with the run, of a file with the last pass
    adam_eps: NonNegative = 1e-5
    max_grad_norm: NonNegative = 1.0  # gradients are clipped to this norm; 0 does not clip

    def new_updater(self, policy: TrainablePolicy) -> Updater:
        """The optimiser of all weights that learn, in one group."""
        weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        adam = AdamConfig(schedule=self.lr_schedule, eps=self.adam_eps, max_grad_norm=self.max_grad_norm)
        return Updater(policy, [(weights, self.lr)], adam, self)


class SupervisedAgent(LearningAgent, Generic[Examples]):
    """Learns from examples, without returns and without a critic.

    Args:
        envs: the token MDP with dict observations.
        config: the algorithm's numbers.
        seed: of everything that is drawn, and of the weights of a residual.
        sampler: how tokens are drawn, given the policy's logits. The loss is of the policy itself.

    Attributes:
        num_timesteps: tokens sampled for examples; of a file, the response tokens learned from.
    """

    Config: ClassVar[type[SupervisedConfig]] = SupervisedConfig
    config: SupervisedConfig
    policy: TrainablePolicy

    def __init__(
        self, envs: RLHFVectorEnv, config: Any = None, *, seed: int = 0, sampler: Sampler | None = None
    ) -> None:
        super().__init__(envs, config, seed=seed, sampler=sampler)
        self._order = torch.zeros(0, dtype=torch.int64)  # what is left of a pass over the file
        self._passes = 0  # begun

    # -- what an algorithm writes --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def file_size(self) -> int | None:
        """Examples in the file that is learned from; None where they are sampled."""

    @abstractmethod
    def sample(self) -> tuple[Examples, int]:
        """`batch_size` fresh examples, and how many tokens were sampled for them."""

    @abstractmethod
    def select(self, rows: Tensor) -> tuple[Examples, int]:
        """Examples of the file by their rows (n,), and how many response tokens they have."""

    @abstractmethod
    def part(self, examples: Examples, rows: slice) -> tuple[Examples, float]:
        """Some rows of examples, and their share of what the loss is a mean over."""

    @abstractmethod
    def loss(self, examples: Examples) -> Loss:
        """The loss of examples, a scalar mean, and metrics that are means alike. The tokens read are counted here."""

    @abstractmethod
    def describe(self, examples: Examples) -> dict[str, float]:
        """Metrics of examples before they are learned from."""

    # -- the loop ------------------------------------------------------------------------------------------------

    @final
    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `num_timesteps` is `total_timesteps` in all; at most `epochs` passes over a file.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: gets (num_timesteps, metrics) after every batch; training stops if it returns False.
        """
        while self.num_timesteps < total_timesteps:
            started = time.perf_counter()
            self._before_batch = self.state()
            if self.file_size is None:
                progress = self.num_timesteps / total_timesteps
                updates = self.config.epochs
                examples, tokens = self.sample()
            else:
                progress = (self._passes - len(self._order) / self.file_size) / self.config.epochs
                updates = 1
                rows = self._next_rows(self.file_size)
                if rows is None:
                    self._before_batch = None
                    return
                examples, tokens = self.select(rows)
            self.updater.set_lr(progress)
            metrics = self.describe(examples)
            metrics["train/lr"] = self.updater.lr
            with self.changing_weights():
                metrics |= self.update(examples, updates)
                self.num_timesteps += tokens
            metrics["time/tokens_per_second"] = tokens / (time.perf_counter() - started)
            metrics |= self.tokens.metrics()
            goes_on = callback is None or callback(self.num_timesteps, metrics) is not False
            if not self.processes.all_agree(goes_on):
                return

    def update(self, examples: Examples, updates: int) -> dict[str, float]:
        """Takes `updates` optimiser steps on examples; returns the means of their metrics."""
        history = [self.step(examples) for _ in range(updates)]
        check_weights(self.policy, self.config)
        return {name: sum(row[name] for row in history) / updates for name in history[0]}

    def step(self, examples: Examples) -> dict[str, float]:
        """Takes one optimiser step on examples; of several processes each takes the gradient of its own rows."""
        own, share = self._own_part(examples)
        before = replace(self.tokens)
        loss, metrics = self.loss(own)
        if share == 0:
            self.tokens = replace(before)
        self.tokens.share(before, self.processes)
        means = {"train/loss": loss.detach(), **metrics}
        shares = {name: share * value for name, value in means.items()}
        return self.updater.step([(share * loss, shares)], processes=self.processes)

    def _own_part(self, examples: Examples) -> tuple[Examples, float]:
        """This process's rows and their share of the loss; one that counts nothing where there are too few."""
        if self.processes.count == 1:
            return examples, 1.0
        own, share = self.part(examples, self.processes.rows)
        if share == 0:
            own, _ = self.part(examples, slice(1))
        return own, share

    def _next_rows(self, total: int) -> Tensor | None:
        """The next `batch_size` of `total` rows, each once a pass, the last ones of a pass fewer; None at the end."""
        if not len(self._order):
            if self._passes == self.config.epochs:
                return None
            self._order = torch.randperm(total, generator=self.generator)
            self._passes += 1
        rows = self._order[: self.config.batch_size]
        self._order = self._order[self.config.batch_size :]
        return rows

    def log_probs(self, episodes: Episodes) -> Tensor:
        """(n,) log pi(a_t|s_t) of every response token, nats, row by row of the mask; differentiable."""
        episodes = episodes.to(self.policy.device)
        return token_log_probs(self.policy.read(episodes).logits, episodes.response_ids[episodes.response_mask])

    # -- saving and loading --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What changes from batch to batch, but for the weights (`LearningAgent.state`)."""
        return {**super().state(), "passes": self._passes, "order": self._order.clone()}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        super().restore(state)
        self._passes = state["passes"]
        self._order = state["order"]


# -- responses that nobody has scored --------------------------------------------------------------------------------


@contextlib.contextmanager
def named_row(where: str) -> Iterator[None]:
    """Has an `InvalidArgumentError` say which row of a file it is of."""
    try:
        yield
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{where}: {error}") from error


def response_ids(engine: Engine, text: str, prompt: Prompt, completion: str) -> list[int]:
    """Token ids of a completion: those of the text of both after the prompt's.

    Raises:
        InvalidArgumentError: for one that is no response of the task.
    """
    response = engine.lm.encode_response(text, prompt.ids, completion)
    if not 1 <= len(response) <= engine.horizon:
        raise InvalidArgumentError(
            f"`completions` must have 1 to {engine.horizon} tokens (`max_new_tokens`), and {completion!r} after "
            f"{text!r} has {len(response)}."
        )
    if engine.end_rule.find_end(response[:-1]) is not None:
        raise InvalidArgumentError(f"`completions` must end at their first EOS, and {completion!r} goes on after it.")
    return response


def unscored(engine: Engine, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> Episodes:
    """Responses as episodes without a score, with the reference's log-probs; the log-probs of their author are 0."""
    b = len(prompts)
    horizon = engine.horizon
    ids, mask = pad_right(responses, engine.lm.pad_token_id, horizon)
    prompt_ids, prompt_mask = engine.pad_prompts(prompts)
    episodes = Episodes(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids,
        response_mask=mask,
        log_probs=torch.zeros((b, horizon)),
        ref_log_probs=torch.zeros((b, horizon)),
        scores=torch.full((b,), math.nan),
        values=None,
        terminated=torch.ones(b, dtype=torch.bool),
        prompt_index=torch.tensor([prompt.index for prompt in prompts]),
    )
    return with_reference(engine, episodes)


def with_reference(engine: Engine, episodes: Episodes) -> Episodes:
    """Episodes with the reference's log-probs, where the env has not asked it."""
    parts = (episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, episodes.response_mask)
    return replace(episodes, ref_log_probs=engine.lm.response_log_probs(*parts).clone())
