"""The template of an agent that fits examples: those of a file, or batches that it samples.

An algorithm is a config dataclass, `sample()`, `select()`, `loss()` and `describe()`. The loop is the same for all.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from agents.agent import Callback, PolicyAgent, TokenCount
from agents.finite import GRAD_NORM, check_saving, check_step, check_weights
from agents.master_weights import MasterWeights
from agents.policies.actor_critic import TrainablePolicy
from agents.policies.choice import PolicyConfig, make_policy
from agents.seeds import WEIGHTS, row_seeds, stream_seed
from lmgym.envs.engine import Engine
from lmgym.envs.prompts import Prompt
from lmgym.envs.vector import RLHFVectorEnv
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, check_choice, check_int, check_number
from lmgym.models.causal import token_log_probs
from lmgym.models.sampling import Sampler

Examples = TypeVar("Examples")


@dataclass(frozen=True)
class SupervisedConfig(PolicyConfig):
    """What every agent has that fits examples."""

    batch_size: int = 64  # examples an optimiser step
    epochs: int = 1  # sampled: passes over each batch; file: over the file
    lr: float = 5e-4  # Adam's, at first
    lr_schedule: Literal["constant", "linear"] = "linear"  # linear ends at 0 with the run, of a file with the last pass
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 does not clip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("lr_schedule", self.lr_schedule, ("constant", "linear"))
        for name in ("batch_size", "epochs"):
            check_int(name, getattr(self, name), 1)
        for name in ("lr", "adam_eps", "max_grad_norm"):
            check_number(name, getattr(self, name), 0)


class SupervisedAgent(PolicyAgent, Generic[Examples]):
    """Learns from examples, without returns and without a critic.

    Args:
        envs: the token MDP with dict observations.
        config: the algorithm's numbers.
        seed: of everything that is drawn, and of the weights of a residual.
        sampler: the law that tokens are drawn from, given logits. The loss is of the policy itself.

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
        self.policy = make_policy(envs, self.config, stream_seed(seed, WEIGHTS))
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=self.config.lr, eps=self.config.adam_eps)
        self.masters = MasterWeights(self.optimizer)
        self._before_batch: dict[str, Any] | None = None  # the state there, while nothing has been learned since
        envs.reset(seed=row_seeds(seed, envs.num_envs))
        self._order, self._passes = torch.zeros(0, dtype=torch.int64), 0  # what is left of a pass; passes begun

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
    def loss(self, examples: Examples) -> tuple[Tensor, dict[str, float]]:
        """The loss of examples, a scalar, and metrics. The tokens read are counted here."""

    @abstractmethod
    def describe(self, examples: Examples) -> dict[str, float]:
        """Metrics of examples before they are learned from."""

    # -- the loop ------------------------------------------------------------------------------------------------

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> None:
        """Trains until `num_timesteps` is `total_timesteps` in all; at most `epochs` passes over a file.

        Args:
            total_timesteps: of the whole run, steps before a resume included.
            callback: sees (num_timesteps, metrics) after every batch; training stops if it returns False.
        """
        while self.num_timesteps < total_timesteps:
            started = time.perf_counter()
            self._before_batch = self._state()
            if self.file_size is None:
                progress, updates = self.num_timesteps / total_timesteps, self.config.epochs
                examples, tokens = self.sample()
            else:
                progress, updates = (self._passes - len(self._order) / self.file_size) / self.config.epochs, 1
                rows = self._next_rows(self.file_size)
                if rows is None:
                    self._before_batch = None
                    return
                examples, tokens = self.select(rows)
            metrics = self.describe(examples)
            metrics["train/lr"] = self.config.lr * (1 - progress if self.config.lr_schedule == "linear" else 1)
            for group in self.optimizer.param_groups:
                group["lr"] = metrics["train/lr"]
            self._before_batch, self.at_rest = None, False
            history = [self._step(examples) for _ in range(updates)]
            check_weights(self.policy, self.config)
            metrics |= {name: sum(row[name] for row in history) / updates for name in history[0]}
            self.num_timesteps += tokens
            self.at_rest = True
            metrics["time/tokens_per_second"] = tokens / (time.perf_counter() - started)
            metrics |= self.tokens.metrics()
            if callback is not None and callback(self.num_timesteps, metrics) is False:
                return

    def _next_rows(self, total: int) -> Tensor | None:
        """The next `batch_size` of `total` rows, each once a pass, the last ones of a pass fewer; None at the end."""
        if not len(self._order):
            if self._passes == self.config.epochs:
                return None
            self._order, self._passes = torch.randperm(total, generator=self.generator), self._passes + 1
        rows, self._order = self._order[: self.config.batch_size], self._order[self.config.batch_size :]
        return rows

    def _step(self, examples: Examples) -> dict[str, float]:
        loss, metrics = self.loss(examples)
        limit = self.config.max_grad_norm or math.inf
        norm = gradient_of(loss, self.policy.parameters(), limit)
        metrics = {"train/loss": loss.item(), **metrics, GRAD_NORM: norm}
        check_step(metrics, self.policy, self.config, {})
        self.optimizer.step()
        return metrics

    def log_probs(self, episodes: Episodes) -> Tensor:
        """(n,) log pi(a_t|s_t) of every response token, nats, row by row of the mask; differentiable."""
        episodes = episodes.to(self.policy.device)
        return token_log_probs(self.policy.read(episodes).logits, episodes.response_ids[episodes.response_mask])

    # -- acting, saving, loading ---------------------------------------------------------------------------------

    def next_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, V) logits of each row's next token, from one forward over (B, L) ids; mask (B, L) is True on tokens."""
        left = ids.gather(1, (~mask).to(torch.uint8).argsort(dim=1, stable=True))
        return self.policy.next_logits(left, mask.sum(-1))

    def write(self, directory: Path) -> None:
        """Writes the files of a checkpoint into an empty directory."""
        check_saving(self.policy, self.optimizer, self.config)
        self.policy.save(directory)
        state = dict(self._before_batch or self._state())
        training = {name: state.pop(name) for name in ("generator", "order")}
        torch.save({"optimizer": self.optimizer.state_dict(), **training}, directory / "training.pt")
        (directory / "state.json").write_text(json.dumps(state, default=np.ndarray.tolist))

    def _state(self) -> dict[str, Any]:
        """What changes from batch to batch but for the weights and what the optimiser knows of them."""
        return {
            "num_timesteps": self.num_timesteps,
            "tokens": asdict(self.tokens),
            "passes": self._passes,
            "config": asdict(self.config),
            "env": self.envs.streams(),
            "generator": self.generator.get_state(),
            "order": self._order.clone(),
        }

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote: the same curve as if there had been no break."""
        directory = Path(directory)
        self.policy.load(directory)
        training = torch.load(directory / "training.pt", weights_only=True, map_location=self.policy.device)
        self.optimizer.load_state_dict(training["optimizer"])
        self.generator.set_state(training["generator"].cpu())
        state = json.loads((directory / "state.json").read_text())
        self.num_timesteps, self._passes, self._order = state["num_timesteps"], state["passes"], training["order"].cpu()
        self.tokens = TokenCount(**state["tokens"])
        self.envs.set_state(state["env"])
        self._before_batch, self.at_rest = None, True


def gradient_of(loss: Tensor, weights: Iterable[nn.Parameter], max_grad_norm: float) -> float:
    """Gives weights the gradient of a loss, scaled down to `max_grad_norm` where its norm is larger.

    Args:
        loss: a scalar. weights: what it depends on. max_grad_norm: of all their gradients together.

    Returns:
        The norm before.
    """
    weights = list(weights)
    for weight in weights:
        weight.grad = None
    loss.backward()
    return nn.utils.clip_grad_norm_(weights, max_grad_norm).item()


# -- responses that nobody has scored --------------------------------------------------------------------------------


@contextlib.contextmanager
def named_row(where: str) -> Iterator[None]:
    """Has an `InvalidArgumentError` say which row of a file it is of."""
    try:
        yield
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{where}: {error}") from error


def response_ids(engine: Engine, text: str, prompt: Prompt, completion: str) -> list[int]:
    """Token ids of a completion: those that the text of both has behind the prompt's.

    Raises:
        InvalidArgumentError: for one that is no response of the task.
    """
    response = engine.lm.encode_response(text, prompt.ids, completion)
    if not 1 <= len(response) <= engine.horizon:
        raise InvalidArgumentError(
            f"`completions` must have 1 to {engine.horizon} tokens (`max_new_tokens`), and {completion!r} behind "
            f"{text!r} has {len(response)}."
        )
    if engine.end_rule.find_end(response[:-1]) is not None:
        raise InvalidArgumentError(f"`completions` must end at their first EOS, and {completion!r} goes on behind it.")
    return response


def unscored(engine: Engine, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> Episodes:
    """Responses as episodes without a score, with the reference's log-probs; log-probs of whoever wrote them are 0."""
    b, horizon = len(prompts), engine.horizon
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(horizon) < lengths.unsqueeze(1)
    ids = torch.full((b, horizon), engine.lm.pad_token_id)
    ids[mask] = torch.tensor([token for response in responses for token in response])
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
