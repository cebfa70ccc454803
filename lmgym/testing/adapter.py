"""What `check_trainer` asks of a trainer: functions of plain tensors, each of them optional.

Shapes: B responses, P prompt columns, T response columns, V vocabulary. A mask is bool, True on a token that was
chosen, the EOS included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """Prompts and responses as a model reads them.

    Attributes:
        prompt_ids: (B, P) int64, left-padded. prompt_mask: (B, P) bool.
        response_ids: (B, T) int64, right-padded. response_mask: (B, T) bool.
        eos: id of the token that ends a response. pad: id of the padding.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    eos: int
    pad: int

    @property
    def input_ids(self) -> Tensor:
        """(B, P + T) prompt and response side by side."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + T) int64: 1 on every real token."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1).long()


@dataclass(frozen=True)
class LossInputs:
    """What a policy loss is computed from: a part of the responses of one optimiser step.

    The losses of the parts are added up, and those of the ranks averaged, as gradient accumulation and
    `DistributedDataParallel` do with gradients.

    Attributes:
        log_probs: (B, T) nats, with a gradient; those of padding are numbers without a meaning.
        old_log_probs: (B, T) with which the tokens were drawn.
        ref_log_probs: (B, T) under the reference.
        advantages: (B, T), the same number at every token where an advantage is of the response.
        mask: (B, T) bool.
        kl_coef: the price of a nat, where the loss has a KL term.
        parts: micro-batches of the optimiser step on this rank. ranks: how many processes there are.
        step_tokens: chosen tokens of the whole step, over all parts and ranks. step_responses: the same of responses.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    kl_coef: float = 0.0
    parts: int = 1
    ranks: int = 1
    step_tokens: int = 0
    step_responses: int = 0

    def __post_init__(self) -> None:
        if not self.step_responses:
            object.__setattr__(self, "step_tokens", int(self.mask.sum()))
            object.__setattr__(self, "step_responses", len(self.mask))

    def split(self, count: int, *, over_ranks: bool = False) -> list[LossInputs]:
        """Equal parts of the rows, as micro-batches of one step or as the batches of several ranks."""
        parts = []
        for rows in torch.arange(len(self.mask)).chunk(count):
            names = ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "mask")
            changes: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
            changes["ranks" if over_ranks else "parts"] = count
            parts.append(replace(self, **changes))
        return parts


@dataclass(frozen=True)
class RewardInputs:
    """What the reward of each token is computed from: scores (B,), log-probs (B, T) and `mask` (B, T) bool."""

    scores: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    mask: Tensor
    kl_coef: float


@dataclass(frozen=True)
class GAEInputs:
    """What advantages with a critic are computed from.

    Attributes:
        rewards: (B, T). values: (B, T) before each token, with a gradient, as a critic's forward gives them.
        mask: (B, T) bool. gamma, gae_lambda: numbers in [0, 1].
        truncated: (B,) bool: the length limit cut the response, and the task goes on.
        next_values: (B,) V of the state after the last token, with a gradient.
    """

    rewards: Tensor
    values: Tensor
    mask: Tensor
    gamma: float
    gae_lambda: float
    truncated: Tensor
    next_values: Tensor


@dataclass(frozen=True)
class GroupInputs(RewardInputs):
    """What advantages without a critic are computed from; each `group_size` neighbours answer the same prompt."""

    group_size: int


@dataclass(frozen=True, kw_only=True)
class TrainerAdapter:
    """A trainer's own functions, with their arguments brought into the shapes above.

    A function that is None is not checked. One may raise `NotImplementedError` for what its trainer does not have
    (such as `gae` for a response that was truncated), and that is not checked either.

    Attributes:
        name: what the report calls the trainer.
        prepare: what the trainer makes of a Hugging Face causal LM before it trains it (dropout off, a copy), given the
            temperature of the sampling; the functions below get that.
        response_mask: (B, T) of ids (B, T), the id of EOS and that of padding; padding may be EOS.
        log_probs: (B, T) nats of the response tokens, differentiable, 0 or anything off the mask. Takes what `prepare`
            made, `Responses` and the temperature.
        lora_log_probs: of the policy and of its reference, each (B, T), where the policy is a model with LoRA adapters.
            Takes the model, `Responses`, and a function to call with the policy: it changes the weights called lora
            that learn.
        model_loss: the policy loss at the first optimiser step of `Responses` with advantages (B,), differentiable.
            Takes what `prepare` made, `Responses` and the advantages. None is made of `log_probs` and `loss`.
        loss: the policy loss of `LossInputs`, differentiable, with its KL term where it has one.
        token_rewards: (B, T) of `RewardInputs`.
        gae: (B, T) advantages of `GAEInputs`, not whitened.
        group_advantages: (B,) or (B, T) of `GroupInputs`.
        whiten: (B, T) of numbers (B, T) and their mask.
        detect_stale: raises, or returns True, where log-probs (B, T) of a first step are not those of the sampling.
            Takes the new ones, the old ones and the mask.
        has_kl: whether the rewards or the loss have a KL term.
        by_design: what the trainer's own objective breaks on purpose: name of the invariant -> the reason.
    """

    name: str
    prepare: Callable[[Any, float], Any] = lambda model, temperature: model
    response_mask: Callable[[Tensor, int, int], Tensor] | None = None
    log_probs: Callable[[Any, Responses, float], Tensor] | None = None
    lora_log_probs: Callable[[Any, Responses, Callable[[Any], None]], tuple[Tensor, Tensor]] | None = None
    model_loss: Callable[[Any, Responses, Tensor], Tensor] | None = None
    loss: Callable[[LossInputs], Tensor] | None = None
    token_rewards: Callable[[RewardInputs], Tensor] | None = None
    gae: Callable[[GAEInputs], Tensor] | None = None
    group_advantages: Callable[[GroupInputs], Tensor] | None = None
    whiten: Callable[[Tensor, Tensor], Tensor] | None = None
    detect_stale: Callable[[Tensor, Tensor, Tensor], bool | None] | None = None
    has_kl: bool = True
    by_design: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model_loss is None and self.loss is not None and self.log_probs is not None:
            object.__setattr__(self, "model_loss", self._compose_loss)

    def _compose_loss(self, model: Any, responses: Responses, advantages: Tensor) -> Tensor:
        """The policy loss of a first step, from `response_mask`, `log_probs` and `loss`."""
        assert self.log_probs is not None
        assert self.loss is not None
        mask = responses.response_mask
        if self.response_mask is not None:
            mask = self.response_mask(responses.response_ids, responses.eos, responses.pad).bool()
        log_probs = self.log_probs(model, responses, 1.0)
        spread = advantages.unsqueeze(1).expand_as(log_probs)
        old = log_probs.detach()
        return self.loss(LossInputs(log_probs, old, old, spread, mask))
