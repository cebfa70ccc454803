"""Invariants of the mask and of the log-probs that a trainer reads from a model."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch

from lmgym.testing import probes
from lmgym.testing.adapter import TrainerAdapter
from lmgym.testing.invariants.base import FLOAT32, Gaps, invariant, largest_gap

HORIZON = 4
MASKED = [  # response ids without padding; what stands after an EOS is padding
    [2, 3, probes.EOS],
    [probes.EOS],
    [2, 3, 4, 5],
    [3, 2, 5, probes.EOS],
]


@invariant("eos-in-mask", "response_mask", tolerance=0, reason="a mask is exact")
def eos_in_mask(trainer: TrainerAdapter) -> Gaps:
    """The mask has every token up to and with the first EOS, and nothing after it, also where padding is EOS."""
    assert trainer.response_mask is not None
    expected = torch.tensor([[t < len(row) for t in range(HORIZON)] for row in MASKED])
    for pad, name in ((0, "padding is a token of its own"), (probes.EOS, "padding is EOS")):
        ids = torch.tensor([row + [pad] * (HORIZON - len(row)) for row in MASKED])
        found = trainer.response_mask(ids, probes.EOS, pad)
        yield f"tokens that are wrong where {name}", float((found.bool() != expected).sum())


@invariant("token-log-probs", "log_probs", tolerance=1e-3, reason=FLOAT32)
def token_log_probs(trainer: TrainerAdapter) -> Gaps:
    """A token's log-prob is that of the token given what stands before it, in nats."""
    assert trainer.log_probs is not None
    responses = probes.some_responses()
    model = trainer.prepare(probes.rotary_model(), 1.0)
    found = trainer.log_probs(model, responses, 1.0)
    expected = probes.plain_log_probs(model, responses)
    yield "nats from those of each response read alone", largest_gap(found, expected, responses.response_mask)


@invariant("temperature", "log_probs", tolerance=1e-3, reason=FLOAT32)
def temperature(trainer: TrainerAdapter) -> Gaps:
    """Log-probs are of the distribution that samples: logits are divided by the temperature first."""
    assert trainer.log_probs is not None
    responses = probes.some_responses()
    model = trainer.prepare(probes.rotary_model(), 0.5)
    found = trainer.log_probs(model, responses, 0.5)
    expected = probes.plain_log_probs(model, responses, 0.5)
    yield "nats at temperature 0.5", largest_gap(found, expected, responses.response_mask)


@invariant("right-padding", "log_probs", tolerance=1e-3, reason=FLOAT32)
def right_padding(trainer: TrainerAdapter) -> Gaps:
    """More padding after the responses changes no log-prob."""
    assert trainer.log_probs is not None
    responses = probes.some_responses()
    columns = responses.response_ids.shape[1]
    model = trainer.prepare(probes.rotary_model(), 1.0)
    before = trainer.log_probs(model, responses, 1.0)
    after = trainer.log_probs(model, probes.widen(responses, right=3), 1.0)
    yield "nats with 3 more columns", largest_gap(after[:, :columns], before, responses.response_mask)


@invariant("left-padding", "log_probs", tolerance=1e-3, reason=FLOAT32)
def left_padding(trainer: TrainerAdapter) -> Gaps:
    """More padding before the prompts changes no log-prob, with rotary positions."""
    assert trainer.log_probs is not None
    yield "nats with 3 more columns", _left_gap(trainer, probes.rotary_model())


@invariant("positions", "log_probs", tolerance=1e-3, reason=FLOAT32)
def positions(trainer: TrainerAdapter) -> Gaps:
    """Positions count real tokens: padding before the prompts changes no log-prob, with learned positions either."""
    assert trainer.log_probs is not None
    model = probes.learned_positions_model()
    yield "nats with 3 more columns", _left_gap(trainer, model)


def _left_gap(trainer: TrainerAdapter, model: Any) -> float:
    assert trainer.log_probs is not None
    responses = probes.some_responses()
    model = trainer.prepare(model, 1.0)
    before = trainer.log_probs(model, responses, 1.0)
    after = trainer.log_probs(model, probes.widen(responses, left=3), 1.0)
    return largest_gap(after, before, responses.response_mask)


@invariant("row-mates", "log_probs", tolerance=1e-3, reason=FLOAT32)
def row_mates(trainer: TrainerAdapter) -> Gaps:
    """A response's log-probs do not depend on the other rows of the batch."""
    assert trainer.log_probs is not None
    responses = probes.some_responses()
    model = trainer.prepare(probes.rotary_model(), 1.0)
    together = trainer.log_probs(model, responses, 1.0)
    for row in range(len(together)):
        one = slice(row, row + 1)
        names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
        alone = replace(responses, **{name: getattr(responses, name)[one] for name in names})
        mask = alone.response_mask
        yield "nats from the row alone", largest_gap(trainer.log_probs(model, alone, 1.0), together[one], mask)


@invariant("dropout-off", "log_probs", tolerance=1e-3, reason=FLOAT32)
def dropout_off(trainer: TrainerAdapter) -> Gaps:
    """Two readings of one policy agree where the model has dropout: a ratio of two would be noise."""
    assert trainer.log_probs is not None
    responses = probes.some_responses()
    model = trainer.prepare(probes.learned_positions_model(dropout=0.5), 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = trainer.log_probs(model, responses, 1.0)
        second = trainer.log_probs(model, responses, 1.0)
    yield "nats between two readings", largest_gap(first, second, responses.response_mask)


@invariant("lora-reference", "lora_log_probs", tolerance=1e-3, reason=FLOAT32)
def lora_reference(trainer: TrainerAdapter) -> Gaps:
    """The reference of a policy with LoRA adapters is the base model, however far the adapters have moved."""
    assert trainer.lora_log_probs is not None
    if importlib.util.find_spec("peft") is None:
        raise NotImplementedError("the package peft is not installed")
    responses = probes.some_responses()
    expected = probes.plain_log_probs(probes.rotary_model(), responses)
    policy, reference = trainer.lora_log_probs(probes.rotary_model(), responses, _disturb)
    mask = responses.response_mask
    yield "nats of the reference from the base model", largest_gap(reference, expected, mask)
    moved = largest_gap(policy, expected, mask)
    yield "policy that the adapters have not moved", float(moved < 0.1)


@torch.no_grad()
def _disturb(policy: Any) -> None:
    """Moves the weights of LoRA adapters that learn, the same for every policy of one shape."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    for name, weight in policy.named_parameters():
        if "lora_" in name and weight.requires_grad:
            weight += 0.5 * torch.randn(weight.shape, generator=generator).to(weight)
            count += 1
    if not count:
        raise ValueError("The policy must have weights that learn with 'lora_' in their names, got none.")


INVARIANTS = (
    eos_in_mask,
    token_log_probs,
    temperature,
    right_padding,
    left_padding,
    positions,
    row_mates,
    dropout_off,
    lora_reference,
)
