"""The lean forward of an optimiser step against the models' own: values, gradients, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_lean import KNOWN, UNKNOWN, drawn
from torch import Tensor, nn

from agents.policies.actor_critic import ActorCritic
from lmgym.models.causal import CausalLM
from lmgym.models.lean import find, products
from lmgym.models.lean.find import find_trained, find_trained_trunk, has_equal_gradients
from lmgym.models.lean.products import affine
from lmgym.models.lean.training import read_at

LENGTHS = (9, 4, 7)  # tokens of each row, of which the last is not read
PROMPTS = (3, 1, 6)


def sequences(lm: CausalLM) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids (3, 9), and the row and column of each position that is read."""
    ids = torch.randint(lm.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(3))
    read = [(row, t) for row in range(3) for t in range(PROMPTS[row] - 1, LENGTHS[row] - 1)]
    rows, columns = torch.tensor(read).T
    return ids, rows, columns


def trained(lm: CausalLM) -> CausalLM:
    """A copy whose parameters take gradients."""
    return CausalLM(copy.deepcopy(lm.model).requires_grad_(True), lm.tokenizer)


def losses_of(hidden: Tensor, logits: Tensor) -> Tensor:
    """A sum that weighs every number differently."""
    log_probs = logits.log_softmax(-1).masked_fill(logits == -torch.inf, 0.0)
    parts = [(torch.linspace(-1, 1, x.numel()).view_as(x) * x).sum() for x in (hidden, log_probs)]
    return parts[0] + parts[1]


@pytest.mark.parametrize(("name", "changes"), KNOWN, ids=[f"{i} {name}" for i, (name, _) in enumerate(KNOWN)])
def test_values_and_gradients_are_those_of_the_plain_forward(name: str, changes: dict[str, Any]) -> None:
    lm = trained(drawn(name, changes))
    assert lm.remember(find_trained) is not None
    ids, rows, columns = sequences(lm)
    found = lm.read_at(ids, rows, columns)
    expected = lm.response_hidden(ids, rows, columns)
    parameters = list(lm.model.parameters())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * max(1.0, float(y.detach()[y.isfinite()].abs().max())))
    gradients = torch.autograd.grad(losses_of(*found), parameters, materialize_grads=True)
    plain = torch.autograd.grad(losses_of(*expected), parameters, materialize_grads=True)
    for x, y in zip(gradients, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5 * max(1.0, float(y.abs().max())))


def test_positions_in_any_order_and_rows_without_padding() -> None:
    lm = trained(drawn("GPT-2", {}))
    ids, rows, columns = sequences(lm)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for r, c in ((rows[order], columns[order]), (torch.arange(3), torch.full((3,), 8))):
        for x, y in zip(lm.read_at(ids, r, c), lm.response_hidden(ids, r, c), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    lm = trained(drawn("Llama", {}))
    ids, rows, columns = sequences(lm)
    other = ids.clone()
    other[1, 4:] = 1
    for x, y in zip(lm.read_at(ids, rows, columns), lm.read_at(other, rows, columns), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("name", "changes"), UNKNOWN)
def test_models_without_a_lean_forward_run_as_they_are(name: str, changes: dict[str, Any]) -> None:
    lm = trained(drawn(name, changes))
    assert lm.remember(find_trained) is None
    assert find_trained_trunk(lm.model.base_model) is None
    parts = sequences(lm)
    for x, y in zip(lm.read_at(*parts), lm.response_hidden(*parts), strict=True):
        assert torch.equal(x, y)


def test_a_frozen_model_is_probed_too_and_stays_frozen() -> None:
    lm = drawn("GPT-2", {})
    with torch.inference_mode():
        assert find_trained(lm) is not None
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


class Detached(nn.Module):
    """The same values, and no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x.detach())


def test_a_wrong_gradient_and_a_changed_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = trained(drawn("GPT-2", {"activation_function": "relu"}))
    trunk = lm.model.base_model
    trained_trunk = find_trained_trunk(trunk)
    assert trained_trunk is not None
    lean = trained_trunk.lean
    block = trunk.h[0]
    plain = type(block)
    block.__class__ = type(plain.__name__, (plain,), {"__module__": "elsewhere"})
    assert not has_equal_gradients(trunk, lean)
    block.__class__ = plain
    monkeypatch.setattr(find, "read_here", lambda *parts: read_at(*parts) * torch.linspace(0.99, 1.01, 32))
    assert not has_equal_gradients(trunk, lean)
    monkeypatch.undo()
    assert has_equal_gradients(trunk, lean)
    object.__setattr__(lean.layers[0].mlp, "activation", Detached())
    assert not has_equal_gradients(trunk, lean)


@pytest.mark.parametrize("stored_as_out_by_in", [True, False])
def test_the_gradient_of_a_large_product_is_that_of_the_plain_one(
    stored_as_out_by_in: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_MIN_NUMBERS", 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((9, 5), generator=generator, requires_grad=True)
    stored = torch.randn((7, 5) if stored_as_out_by_in else (5, 7), generator=generator, requires_grad=True)
    bias = torch.randn(7, generator=generator, requires_grad=True)
    weight = stored.t() if stored_as_out_by_in else stored
    found = affine(x, weight, bias)
    expected = torch.addmm(bias, x, weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    inputs = (x, stored, bias)
    firsts = [torch.autograd.grad(y.square().sum(), inputs, create_graph=True) for y in (found, expected)]
    seconds = [torch.autograd.grad(sum(g.square().sum() for g in first), inputs) for first in firsts]
    for found_gradients, expected_gradients in (firsts, seconds):
        for g, h in zip(found_gradients, expected_gradients, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-3)


def test_a_critic_with_a_trunk_of_its_own_says_the_same() -> None:
    policy = ActorCritic(drawn("GPT-2", {}), "reference")
    nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(0))
    parts = sequences(policy.lm)
    assert policy._lean_critic is not None
    found = policy.read_at(*parts)
    policy._lean_critic = None
    expected = policy.read_at(*parts)
    weights = policy.critic_parameters()
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-5)
    for x, y in zip(
        torch.autograd.grad(found.values.square().sum(), weights),
        torch.autograd.grad(expected.values.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5 * max(1.0, float(y.abs().max())))
