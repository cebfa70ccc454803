"""Invariants of a policy loss, on log-probs that are plain numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lmgym.testing import probes
from lmgym.testing.adapter import GroupInputs, LossInputs, RewardInputs, TrainerAdapter
from lmgym.testing.invariants.base import ROUNDING, Gaps, angle_gap, invariant, largest_gap

LENGTHS = (5, 2, 4, 1)
KL_COEF = 0.3


def loss_inputs(drift: float = 0.0) -> LossInputs:
    """Four responses of unequal lengths, whose policy has moved from the old one by up to `drift` nats a token."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    moves = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    reference = old + 0.3 * moves.flip(0)
    advantages = torch.tensor([1.0, -0.5, 0.8, -1.2], dtype=torch.float64).unsqueeze(1).expand(shape)
    log_probs = (old + drift * moves).requires_grad_()
    return LossInputs(log_probs, old, reference, advantages, mask)


def slope(trainer: TrainerAdapter, inputs: LossInputs, of: Tensor | None = None) -> Tensor:
    """The gradient of a trainer's loss with respect to `of`, the log-probs by default; 0 where there is none."""
    assert trainer.loss is not None
    of = inputs.log_probs if of is None else of
    found = torch.autograd.grad(trainer.loss(inputs), of, allow_unused=True)[0]
    return torch.zeros_like(of) if found is None else found


@invariant("padding-out-of-loss", "loss", tolerance=1e-6, reason="0 times anything is 0")
def padding_out_of_loss(trainer: TrainerAdapter) -> Gaps:
    """What stands on padding neither changes the loss nor gets a gradient."""
    assert trainer.loss is not None
    inputs = loss_inputs(0.1)
    noise = torch.linspace(-3, 3, inputs.mask.numel(), dtype=torch.float64).view(inputs.mask.shape)
    columns: dict[str, Any] = {}
    for name in ("log_probs", "old_log_probs", "ref_log_probs", "advantages"):
        column = getattr(inputs, name).detach()
        columns[name] = torch.where(inputs.mask, column, column + noise)
        noise = -noise.flip(1)
    columns["log_probs"].requires_grad_()
    noisy = replace(inputs, **columns)
    yield "change of the loss", largest_gap(trainer.loss(noisy), trainer.loss(inputs))
    yield "gradient on padding", slope(trainer, noisy)[~inputs.mask].abs().max().item()


@invariant("more-padding", "loss", tolerance=1e-5, reason=ROUNDING)
def more_padding(trainer: TrainerAdapter) -> Gaps:
    """The same responses in a wider batch give the same gradient: a mean is over tokens, not over columns."""
    inputs = loss_inputs(0.1)
    wide: dict[str, Any] = {}
    for name in ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "mask"):
        wide[name] = torch.nn.functional.pad(getattr(inputs, name).detach(), (0, 3))
    wide["log_probs"].requires_grad_()
    before = slope(trainer, inputs)
    after = slope(trainer, replace(inputs, **wide))[:, : before.shape[1]]
    yield "change of the gradient, by its largest entry", largest_gap(after, before) / before.abs().max().item()


@invariant("ratio-one", "loss", tolerance=1e-5, reason=ROUNDING)
def ratio_one(trainer: TrainerAdapter) -> Gaps:
    """At the first step, where old and new log-probs are equal, a response learns by A times grad log pi."""
    inputs = loss_inputs()
    found = slope(trainer, inputs)
    for row, mask in enumerate(inputs.mask):
        expected = -inputs.advantages[row][mask]
        yield f"direction of response {row}", angle_gap(found[row][mask], expected)


@invariant("off-policy", "loss", tolerance=1e-5, reason=ROUNDING)
def off_policy(trainer: TrainerAdapter) -> Gaps:
    """After the policy has moved a little the gradient is still that of J: stale tokens count by their ratio."""
    assert trainer.loss is not None
    batch = probes.enumerate_responses(1)
    scores = torch.tensor([0.2, 1.0, -0.6], dtype=torch.float64)[batch.tokens[:, 0]]
    start = batch.logits.detach()
    moved = replace(batch, logits=(start + 0.1 * probes.reference_logits()).requires_grad_())
    old = batch.log_probs_under(start)
    advantages = scores.unsqueeze(1)
    loss = trainer.loss(LossInputs(moved.log_probs, old, old, advantages, batch.mask))
    expected = (moved.logits[0].softmax(-1) * torch.tensor([0.2, 1.0, -0.6], dtype=torch.float64)).sum()
    yield "direction of the expected update", angle_gap(-moved.gradient(loss), moved.gradient(expected))


@invariant("clip-comes-back", "loss", tolerance=0, reason="a gradient is there or it is not")
def clip_comes_back(trainer: TrainerAdapter) -> Gaps:
    """A token that has gone too far the wrong way still learns: the clip is one-sided (a minimum, not a clamp)."""
    for advantage, drift, name in ((1.0, -1.0, "a better token"), (-1.0, 1.0, "a worse token")):
        inputs = loss_inputs()
        log_probs = (inputs.old_log_probs + drift).requires_grad_()
        advantages = torch.full_like(inputs.advantages, advantage)
        found = slope(trainer, replace(inputs, log_probs=log_probs, advantages=advantages))[inputs.mask]
        yield f"share of tokens without a gradient, {name}", (found * -advantage <= 0).double().mean().item()


@invariant("micro-batches", "loss", tolerance=1e-5, reason=ROUNDING)
def micro_batches(trainer: TrainerAdapter) -> Gaps:
    """Gradients of micro-batches with unequal tokens add up to that of the whole."""
    inputs = loss_inputs(0.1)
    whole = slope(trainer, inputs)
    parts = torch.cat([slope(trainer, part, part.log_probs) for part in inputs.split(2)])
    yield "change of the gradient, by its largest entry", largest_gap(parts, whole) / whole.abs().max().item()


@invariant("ranks", "loss", tolerance=1e-5, reason=ROUNDING)
def ranks(trainer: TrainerAdapter) -> Gaps:
    """The average of the gradients of two processes with unequal tokens is that of the whole batch."""
    inputs = loss_inputs(0.1)
    whole = slope(trainer, inputs)
    parts = torch.cat([slope(trainer, part, part.log_probs) for part in inputs.split(2, over_ranks=True)]) / 2
    yield "change of the gradient, by its largest entry", largest_gap(parts, whole) / whole.abs().max().item()


@invariant("masked-response", "loss", tolerance=0, reason="a masked response is not there")
def masked_response(trainer: TrainerAdapter) -> Gaps:
    """A response that is masked wholly (filtered, cut off) gives no gradient and no nan, alone in its batch either."""
    assert trainer.loss is not None
    inputs = loss_inputs(0.1)
    for rows, name in (([2], "one of four"), ([0, 1, 2, 3], "all of them")):
        mask = inputs.mask.clone()
        mask[rows] = False
        masked = replace(inputs, mask=mask, step_tokens=0, step_responses=0)
        found = slope(trainer, masked)
        yield f"gradient, {name}", found[rows].abs().max().item()
        yield f"loss that is not finite, {name}", float(not torch.isfinite(trainer.loss(masked)))
        yield f"gradients that are not finite, {name}", float((~torch.isfinite(found)).sum())


@invariant("policy-gradient", "loss", tolerance=1e-4, reason=ROUNDING)
def policy_gradient(trainer: TrainerAdapter) -> Gaps:
    """The expected first update over all responses, short and long, is along the gradient of the expected score."""
    batch = probes.enumerate_responses(2, has_eos=True)
    table = torch.tensor([0.9, -0.4, 0.3], dtype=torch.float64)
    scores = (table[batch.tokens] * batch.mask).sum(-1)
    probability = (batch.log_probs * batch.mask).sum(-1).exp()
    weights = probability / probability.detach() / len(scores)  # 1 / B, with the gradient of an expectation
    expected = batch.gradient((weights * scores).sum())
    found = _expected_update(trainer, batch, scores, 0.0)
    yield "direction of the expected update", angle_gap(found, expected)


@invariant("kl-gradient-token", "loss", tolerance=1e-4, reason=ROUNDING)
def kl_gradient_of_a_token(trainer: TrainerAdapter) -> Gaps:
    """The expected update of the KL term, over all responses of one token, is along that of KL(pi || pi_ref)."""
    yield from _kl_gaps(trainer, 1)


@invariant("kl-gradient-response", "loss", tolerance=1e-4, reason=ROUNDING)
def kl_gradient_of_a_response(trainer: TrainerAdapter) -> Gaps:
    """The same over responses of two tokens: the first token also answers for the KL of what follows it."""
    yield from _kl_gaps(trainer, 2)


def _kl_gaps(trainer: TrainerAdapter, tokens: int) -> Gaps:
    if not trainer.has_kl:
        raise NotImplementedError("the trainer has no KL term")
    batch = probes.enumerate_responses(tokens)
    reference = batch.log_probs_under(probes.reference_logits())
    probability = (batch.log_probs * batch.mask).sum(-1).exp()
    weights = probability / probability.detach() / len(probability)
    kl = (weights * ((batch.log_probs - reference) * batch.mask).sum(-1)).sum()
    expected = -batch.gradient(kl)  # E grad log pi is 0, so that the log-ratio's own gradient adds nothing
    found = _expected_update(trainer, batch, torch.zeros(len(weights), dtype=torch.float64), KL_COEF)
    yield "direction of the expected update", angle_gap(found, expected)


def _expected_update(trainer: TrainerAdapter, batch: probes.Enumerated, scores: Tensor, kl_coef: float) -> Tensor:
    """(S, V) minus the gradient of a trainer's loss at the first step of a batch that is its own distribution."""
    assert trainer.loss is not None
    log_probs = batch.log_probs
    old = log_probs.detach()
    reference = batch.log_probs_under(probes.reference_logits())
    advantages = _advantages(trainer, RewardInputs(scores, old, reference, batch.mask, kl_coef))
    inputs = LossInputs(log_probs, old, reference, advantages, batch.mask, kl_coef)
    return -batch.gradient(trainer.loss(inputs))


def _advantages(trainer: TrainerAdapter, rewards: RewardInputs) -> Tensor:
    """(B, T): the trainer's own without a critic, or else its rewards to go, or else the scores."""
    shape = rewards.mask.shape
    if trainer.group_advantages is not None:
        group = GroupInputs(**vars(rewards), group_size=shape[0])
        found = trainer.group_advantages(group)
        return found.unsqueeze(1).expand(shape) if found.dim() == 1 else found
    if trainer.token_rewards is not None:
        paid = torch.where(rewards.mask, trainer.token_rewards(rewards), 0.0)
        return paid.flip(1).cumsum(1).flip(1)
    return rewards.scores.unsqueeze(1).expand(shape)


INVARIANTS = (
    padding_out_of_loss,
    more_padding,
    ratio_one,
    off_policy,
    clip_comes_back,
    micro_batches,
    ranks,
    masked_response,
    policy_gradient,
    kl_gradient_of_a_token,
    kl_gradient_of_a_response,
)
