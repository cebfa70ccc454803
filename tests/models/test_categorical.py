"""Log-probs, entropies and KLs with gradients by hand: against autograd, in blocks and off the support."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmgym.kl import entropy, exact
from lmgym.models import categorical
from lmgym.models.categorical import exact_kl, log_probs_and_entropies
from lmgym.models.causal import token_log_probs
from lmgym.models.sampling import Sampler

N = 13
V = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def drawn(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits (N, V) of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn((N, V), generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def tokens_of(logits: Tensor) -> Tensor:
    """(N,) the likeliest tokens of the even rows, the next one of the others."""
    return (logits.argmax(-1) + torch.arange(N) % 2) % V


def with_holes(logits: Tensor) -> Tensor:
    """Logits without two of the tokens, and without more in some rows."""
    out = torch.zeros(N, V, dtype=torch.bool)
    out[:, [0, 4]] = True
    out[::3, 5] = True
    return logits.masked_fill(out, -torch.inf)


@pytest.fixture(params=[1, 3 * V, 1 << 20], ids=["a row a block", "three rows a block", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another size; three rows do not divide N."""
    monkeypatch.setattr(categorical, "_BLOCK_NUMBERS", request.param)


def gradient_of(outputs: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad((weights * outputs).sum(), logits)
    return gradient


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("adjust", [lambda x: x, with_holes, lambda x: 100 * x], ids=["whole", "holes", "large"])
def test_log_probs_and_entropies_are_those_of_log_softmax(adjust: Callable[[Tensor], Tensor]) -> None:
    logits = drawn()
    tokens = tokens_of(adjust(logits.detach()))
    log_probs, entropies = log_probs_and_entropies(adjust(logits), tokens)
    plain = adjust(logits).log_softmax(-1)
    plain_log_probs = plain.gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, plain_log_probs, **CLOSE)
    torch.testing.assert_close(entropies, entropy(plain), **CLOSE)
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn((2, N), generator=generator)
    weights = torch.where(plain_log_probs.isfinite(), first, 0.0)
    plain_log_probs = plain_log_probs.masked_fill(plain_log_probs == -torch.inf, 0.0)
    for ours, by_autograd in (
        ((weights * log_probs).nan_to_num(), weights * plain_log_probs),
        (second * entropies, second * entropy(plain)),
        ((weights * log_probs).nan_to_num() + second * entropies, weights * plain_log_probs + second * entropy(plain)),
    ):
        found = torch.autograd.grad(ours.sum(), logits, retain_graph=True)[0]
        expected = torch.autograd.grad(by_autograd.sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.usefixtures("blocks")
def test_gradients_are_those_of_finite_differences() -> None:
    logits = drawn(dtype=torch.float64)
    tokens = tokens_of(logits)
    assert torch.autograd.gradcheck(lambda x: log_probs_and_entropies(x, tokens), logits)
    assert torch.autograd.gradcheck(lambda x: exact_kl(x, drawn(2, torch.float64).detach()), logits)


@pytest.mark.parametrize(
    "sampler", [Sampler(), Sampler(temperature=0.7), Sampler(top_k=3), Sampler(top_p=0.8, greedy_tokens=2)]
)
def test_the_distribution_is_the_one_that_a_sampler_draws_from(sampler: Sampler) -> None:
    logits = drawn()
    positions = torch.arange(N) % 4
    tokens = sampler.adjust_rows(logits, positions).argmax(-1)
    log_probs, entropies = log_probs_and_entropies(sampler.adjust_rows(logits, positions), tokens)
    plain = sampler.log_distribution(logits, positions)
    plain_log_probs = plain.gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, plain_log_probs, **CLOSE)
    torch.testing.assert_close(entropies, entropy(plain), **CLOSE)
    weights = torch.linspace(-1, 1, N)
    found = gradient_of(log_probs + entropies, logits, weights)
    torch.testing.assert_close(found, gradient_of(plain_log_probs + entropy(plain), logits, weights), **CLOSE)


def test_a_token_outside_the_support_has_probability_0() -> None:
    logits = with_holes(drawn())
    log_probs, entropies = log_probs_and_entropies(logits, torch.zeros(N, dtype=torch.int64))
    assert (log_probs == -torch.inf).all()
    assert entropies.isfinite().all()


def test_logits_that_define_no_distribution_give_nan() -> None:
    logits = torch.zeros(3, V)
    logits[0, 1] = torch.nan
    logits[1, 1] = torch.inf
    logits[2] = -torch.inf
    log_probs, entropies = log_probs_and_entropies(logits, torch.zeros(3, dtype=torch.int64))
    assert log_probs.isnan()[[0, 2]].all()
    assert not log_probs[1].isfinite()
    assert entropies.isnan().all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("adjust", [lambda x: x, with_holes], ids=["whole", "holes"])
def test_the_exact_kl_is_that_of_normalised_log_probs(adjust: Callable[[Tensor], Tensor]) -> None:
    logits = drawn()
    ref_logits = drawn(2).detach()
    plain = exact(adjust(logits).log_softmax(-1), ref_logits.log_softmax(-1))
    found = exact_kl(adjust(logits), ref_logits)
    torch.testing.assert_close(found, plain, **CLOSE)
    weights = torch.linspace(-1, 1, N)
    torch.testing.assert_close(
        gradient_of(found, logits, weights), gradient_of(plain, logits, weights), rtol=1e-5, atol=1e-5
    )


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = drawn(dtype=torch.bfloat16)
    tokens = tokens_of(logits)
    log_probs, entropies = log_probs_and_entropies(logits, tokens)
    plain = logits.detach().float().log_softmax(-1)
    torch.testing.assert_close(log_probs, plain.gather(1, tokens[:, None]).squeeze(1), **CLOSE)
    torch.testing.assert_close(entropies, entropy(plain), **CLOSE)
    assert gradient_of(log_probs + entropies, logits, torch.ones(N)).dtype == torch.bfloat16


def test_token_log_probs_have_the_same_values_with_and_without_a_gradient() -> None:
    logits = drawn()
    tokens = tokens_of(logits)
    torch.testing.assert_close(token_log_probs(logits, tokens), token_log_probs(logits.detach(), tokens), **CLOSE)
