"""Policies that learn: what the loop of an agent asks of one, and the actor-critic over a causal LM.

Shapes: B episodes, P prompt columns, T response columns, n chosen tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from agents.policies.generation import save_generation
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.activations import fuse_activations
from lmgym.models.causal import CausalLM
from lmgym.models.graph_pool import is_captured
from lmgym.models.lean.find import find_trained, find_trained_trunk
from lmgym.models.lean.trained import TrainedTrunk
from lmgym.models.loading import quiet_loading
from lmgym.models.padding import join, pack
from lmgym.models.policy import CausalPolicy, PolicyState

Critic = Literal["shared", "reference", "reward_model"]


class Read(NamedTuple):
    """A policy's reading of chosen tokens, row by row of the episodes' mask.

    Attributes:
        logits: (n, V). values: (n,). hidden: (n, D), the hidden states that the value head read.
    """

    logits: Tensor
    values: Tensor
    hidden: Tensor


class TrainablePolicy(nn.Module, ABC):
    """A policy (`lmgym.models.policy.Policy`) that learns, and the critic that goes with it."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The coarsest type its logits are computed in: how far two computations of one log-prob may differ."""

    @abstractmethod
    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> PolicyState:
        """Reads prompts (B, P), left-padded; values are None where the critic gives none while decoding."""

    @abstractmethod
    def read_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Read:
        """What it says at chosen positions of sequences, from one forward; differentiable.

        Args:
            ids: (B, L) int64, sequences from column 0, right-padded.
            rows: (n,) int64. columns: (n,) int64: the columns of the last tokens read.
        """

    @abstractmethod
    def critic_parameters(self) -> list[nn.Parameter]:
        """The weights that values alone depend on: the value head, and a trunk that only the critic has."""

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the weights into a directory that exists."""

    @abstractmethod
    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what `save` wrote, into this policy.

        Raises:
            InvalidArgumentError: for a checkpoint of another kind.
        """

    @property
    def has_graphs(self) -> bool:
        """Whether its optimiser steps may run as CUDA graphs, which keep memory."""
        return False

    def models(self) -> list[nn.Module]:
        """What it reads: itself, and models that are no part of it."""
        return [self]

    def policy_parameters(self) -> list[nn.Parameter]:
        """The weights that learn and that the logits depend on, a trunk that is shared with the critic included."""
        critic = {id(parameter) for parameter in self.critic_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in critic]

    def read(self, episodes: Episodes) -> Read:
        """What it says at every chosen token, from one forward; differentiable."""
        return self.read_at(*_packed(episodes))

    @torch.no_grad()
    def values(self, episodes: Episodes) -> Tensor:
        """(B, T) V(s_t) before each chosen token, 0 off the mask."""
        values = torch.zeros(episodes.response_mask.shape, device=self.device)
        values[episodes.response_mask] = self.read(episodes).values
        return values

    @torch.no_grad()
    def next_values(self, episodes: Episodes) -> Tensor:
        """(B,) V of the state after each response's last token: what a truncated episode is bootstrapped with."""
        rows = torch.arange(len(episodes), device=self.device)
        columns = episodes.prompt_mask.sum(-1) + episodes.lengths - 1
        return self.read_at(join(*_parts(episodes)), rows, columns).values

    def next_logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, V) logits after sequences (B, L) that begin in column 0 and are `lengths` (B,) tokens long."""
        return self.read_at(ids, torch.arange(len(ids), device=ids.device), lengths - 1).logits


class ActorCritic(TrainablePolicy):
    """A causal LM that chooses tokens, with a value head on its own trunk or on a trunk of its own.

    Dropout stays off: a ratio of probabilities is only one if both are of the same network.

    Args:
        reference: what the policy starts from (copied; KL to it is exactly 0).
        critic: "shared" puts the value head on the policy's trunk; "reference" and "reward_model" give it a copy of
            that model as a trunk of its own.
        reward_model: the Hugging Face classifier that "reward_model" copies.

    Attributes:
        autocast: what `read_at` computes the products of trunks in, the weights being in float32; None is their type.

    Raises:
        InvalidArgumentError: for a reference that is an adapter on another model, or a critic that cannot be.
    """

    def __init__(self, reference: CausalLM, critic: Critic = "shared", reward_model: nn.Module | None = None) -> None:
        super().__init__()
        if hasattr(reference.model, "peft_config"):  # it would be saved as an adapter, without what it learned
            raise InvalidArgumentError(
                "`model` must be a whole model, got one with an adapter in it: merge that with "
                "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)."
            )
        self.critic_kind = critic
        self.autocast: torch.dtype | None = None
        self._start(reference.model)
        self.lm = CausalLM(self.actor, reference.tokenizer, reference.temperature)
        self.critic: nn.Module | None = None
        if critic == "reference":
            self.critic = _trainable(reference.model.base_model)
        elif critic == "reward_model":
            if reward_model is None:
                raise InvalidArgumentError(
                    "`critic` must be 'shared' or 'reference': the task's reward is no model over the policy's tokens."
                )
            self.critic = _trainable(cast(nn.Module, reward_model.base_model))
        trunk = self.actor if self.critic is None else self.critic
        width = trunk.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        self.value_head = new_value_head(width, reference.device)

    def _start(self, model: Any) -> None:
        """Makes the actor of the reference's model."""
        self.actor: Any = _trainable(model)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast or self.lm.dtype

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> PolicyState:
        """Reads prompts (`lmgym.models.policy.Policy`). A critic with its own trunk gives no values while decoding."""
        head = self.value_head if self.critic is None else None
        return CausalPolicy(self.lm, head).begin(prompt_ids, prompt_mask, max_new_tokens)

    def read_at(self, ids: Tensor, rows: Tensor, columns: Tensor) -> Read:
        hidden, logits = self.lm.read_at(ids, rows, columns, self.autocast)
        if self.critic is not None:
            trained = self._lean_critic  # tried out before anything is coarse
            with nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
                hidden = self._read_critic(trained, ids, rows, columns)
        hidden = hidden.float()
        return Read(logits, self.value_head(hidden).squeeze(-1), hidden)

    def _read_critic(self, trained: TrainedTrunk | None, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(n, D) hidden states of the critic's own trunk."""
        assert self.critic is not None
        found = None if trained is None else trained.read_at(ids, rows, columns)
        if found is not None:
            return found
        hidden: Tensor = self.critic(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        return hidden[rows, columns]

    @cached_property  # at the first read: layers may have been told to run again in the backward pass
    def _lean_critic(self) -> TrainedTrunk | None:
        return find_trained_trunk(self.critic)

    @property
    def has_graphs(self) -> bool:
        trunks = [self.lm.remember(find_trained), None if self.critic is None else self._lean_critic]
        return is_captured(self.device) and any(trunk is not None for trunk in trunks)

    def critic_parameters(self) -> list[nn.Parameter]:
        trunk = [] if self.critic is None else list(self.critic.parameters())
        return [*trunk, *self.value_head.parameters()]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the actor and its tokenizer as Hugging Face's, and the critic beside them as `critic.safetensors`.

        What transformers generates from it, by the generation config that is written too, has the policy's own
        distribution.
        """
        directory = Path(directory)
        self._save_actor(directory)
        save_generation(self.lm, directory)
        save_file({name: x.contiguous() for name, x in self._critic_state().items()}, directory / "critic.safetensors")

    def save_model(self, directory: str | os.PathLike[str]) -> None:
        """Writes the actor alone, config and weights, for another program to read; the directory exists."""
        self._save_actor(Path(directory))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what `save` wrote, into this policy.

        Raises:
            InvalidArgumentError: for a checkpoint of another kind.
        """
        directory = Path(directory)
        self._load_actor(directory)
        saved = load_file(directory / "critic.safetensors", device=str(self.device))
        if set(saved) != set(self._critic_state()):
            raise InvalidArgumentError(f"`critic` in {str(directory)!r} is of another kind than this one.")
        self.load_state_dict(saved, strict=False)

    def _save_actor(self, directory: Path) -> None:
        # Files are replaced, not written over: somebody may read the old weights from where they lie on the disk.
        with tempfile.TemporaryDirectory(dir=directory) as new, quiet_loading():
            self.actor.save_pretrained(new)
            for path in Path(new).iterdir():
                path.replace(directory / path.name)

    def _load_actor(self, directory: Path) -> None:
        if (directory / "adapter_config.json").is_file():
            raise InvalidArgumentError("`directory` must hold a whole model, got an adapter (policy=lora).")
        with quiet_loading():  # not `load_causal_lm`: it would hand out an older copy that somebody holds
            saved = AutoModelForCausalLM.from_pretrained(directory, dtype=self.lm.dtype, trust_remote_code=False)
        self.actor.load_state_dict(saved.state_dict())

    def _critic_state(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.state_dict().items() if name.split(".")[0] in ("critic", "value_head")}


class MaskedState:
    """Running responses (`lmgym.models.policy.PolicyState`) of a policy and of what masks its tokens, side by side.

    Args:
        policy: what chooses. mask: what masks it.
        mask_logits: gives the policy's logits (B, V), -inf where those of the mask (B, V) say so.
    """

    def __init__(self, policy: PolicyState, mask: PolicyState, mask_logits: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._policy = policy
        self._mask = mask
        self._mask_logits = mask_logits

    @property
    def logits(self) -> Tensor:
        """(B, V) of each response's next token, -inf off the mask."""
        return self._mask_logits(self._policy.logits, self._mask.logits)

    @property
    def values(self) -> Tensor | None:
        """(B,) the policy's estimate, if it gives one."""
        return self._policy.values

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        for state in (self._policy, self._mask):
            state.begin(rows, prompt_ids, prompt_mask)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        for state in (self._policy, self._mask):
            state.step(tokens)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        for state in (self._policy, self._mask):
            state.keep(rows)


def read_logits(lm: CausalLM, episodes: Episodes) -> Tensor:
    """(n, V) logits of a model at every chosen token of episodes, row by row of their mask."""
    return lm.read_at(*_packed(episodes))[1]


def new_value_head(width: int, device: torch.device) -> nn.Linear:
    """A linear head on hidden states (n, width) that says 0 of every state."""
    # Not through nn.Linear's own initialisation, which draws from the global generator.
    head = nn.utils.skip_init(nn.Linear, width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _packed(episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, L) of prompts and responses from column 0; row and column (n,) that predict each chosen token."""
    return pack(*_parts(episodes))[:3]


def _parts(episodes: Episodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, episodes.response_mask


def _trainable(model: nn.Module) -> nn.Module:
    """A copy of a frozen model in eval mode (no dropout) whose parameters take gradients."""
    copied = fuse_activations(copy.deepcopy(model))
    copied.eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    return copied
