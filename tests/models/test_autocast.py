"""Reading with layers in bfloat16: close to the float32 forward, with logits and gradients in float32."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_lean import KNOWN, UNKNOWN, drawn
from test_lean_training import losses_of, sequences, trained
from torch import Tensor

from lmgym.models.causal import CausalLM
from lmgym.models.lean import products
from lmgym.models.lean.products import _fill_up, logits_in_half

FAMILIES = [KNOWN[0], *{name: (name, changes) for name, changes in [*KNOWN, *UNKNOWN]}.values()]


def gradients_of(lm: CausalLM, read: tuple[Tensor, Tensor]) -> Tensor:
    """(numbers of the model,) gradient of a sum."""
    parameters = list(lm.model.parameters())
    gradients = torch.autograd.grad(losses_of(*read), parameters, materialize_grads=True)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize(("name", "changes"), FAMILIES, ids=[f"{i} {name}" for i, (name, _) in enumerate(FAMILIES)])
def test_values_and_gradients_are_the_plain_ones_but_for_rounding(name: str, changes: dict[str, Any]) -> None:
    lm = trained(drawn(name, changes))
    parts = sequences(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an operation that is slow where types are mixed
        coarse = lm.read_at(*parts, torch.bfloat16)
    plain = lm.response_hidden(*parts)
    for found, expected in zip(coarse, plain, strict=True):
        assert found.dtype == torch.float32
        finite = expected.isfinite()
        assert torch.equal(found.isfinite(), finite)
        gap = (found - expected)[finite].abs().max()
        assert 0 < gap < 0.05 * expected[finite].abs().max()
    found = gradients_of(lm, coarse)
    expected = gradients_of(lm, plain)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.995


def test_a_model_is_tried_out_before_anything_is_coarse() -> None:
    first = trained(drawn("GPT-2", {}))
    parts = sequences(first)
    first.read_at(*parts, torch.bfloat16)
    second = trained(drawn("GPT-2", {}))
    for found, expected in zip(first.read_at(*parts), second.read_at(*parts), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("stored_as_out_by_in", [True, False])
def test_logits_of_rounded_factors_are_not_rounded_themselves(stored_as_out_by_in: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((9, 5), generator=generator, requires_grad=True)
    stored = torch.randn((7, 5) if stored_as_out_by_in else (5, 7), generator=generator, requires_grad=True)
    weight = stored.t() if stored_as_out_by_in else stored
    found = products._HalfProduct.apply(x, weight)
    rounded = (x.bfloat16().float(), weight.bfloat16().float())
    torch.testing.assert_close(found, rounded[0] @ rounded[1])
    gradient = torch.randn(found.shape, generator=generator)
    by_x, by_stored = torch.autograd.grad(found, (x, stored), gradient)
    halved = gradient.bfloat16().float()
    torch.testing.assert_close(by_x, halved @ rounded[1].t())
    by_weight = rounded[0].t() @ halved
    torch.testing.assert_close(by_stored, by_weight.t() if stored_as_out_by_in else by_weight)
    assert torch.equal(logits_in_half(x, weight), x @ weight)  # on a CPU


@pytest.mark.gpu
def test_a_gpu_reads_as_a_cpu_does_but_for_rounding() -> None:
    lm = trained(drawn("GPT-2", {}))
    parts = sequences(lm)
    hidden, logits = lm.response_hidden(*parts)
    expected = gradients_of(lm, (hidden, logits))
    lm.model.to("cuda")
    coarse = lm.read_at(*(x.cuda() for x in parts), torch.bfloat16)
    assert coarse[1].dtype == torch.float32
    finite = logits.isfinite()
    gap = (coarse[1].cpu() - logits)[finite].abs().max()
    assert 0 < gap < 0.05 * logits[finite].abs().max()
    found = gradients_of(lm, (coarse[0].cpu(), coarse[1].cpu()))
    assert torch.cosine_similarity(found.cpu(), expected, dim=0) > 0.995


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_product_with_columns_filled_up(is_transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(8, 70, generator=generator, dtype=torch.float64)
    weight = (weight.t().contiguous().t() if is_transposed else weight).requires_grad_()
    filled = _fill_up(weight)
    assert filled.shape == (8, 128)
    assert filled.t().is_contiguous()
    assert not filled[:, 70:].any()

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, _fill_up(weight))[:, :70]

    torch.testing.assert_close(product(x, weight), x @ weight)
    assert torch.autograd.gradcheck(product, (x, weight))
    assert torch.autograd.gradgradcheck(product, (x, weight))  # TRPO differentiates twice
