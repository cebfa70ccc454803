"""Kernels of distributions on a GPU against plain operations.

Without a GPU it runs in Triton's interpreter, where Triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmgym.models.categorical import log_probs_and_entropies
from lmgym.models.kernels import find_kernels
from lmgym.models.sampling import Sampler, inverse_cdf

BELOW_ONE = math.nextafter(1.0, 0.0)
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("triton")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    return str(request.param)


@pytest.fixture
def draw(device: str) -> Draw:
    from lmgym.models import distribution_kernels

    def run(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        tokens, log_probs = distribution_kernels.draw(logits.to(device), uniforms.to(device))
        return tokens.cpu(), log_probs.cpu()

    return run


def normals(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def uniforms_of(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 257, 5_000, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_draws_what_the_plain_one_draws(vocabulary: int, dtype: torch.dtype, draw: Draw) -> None:
    wide = normals(40, vocabulary + 3).to(dtype)
    logits = wide[:, :vocabulary]  # rows are not beside each other
    uniforms = uniforms_of(40)
    tokens, log_probs = draw(logits, uniforms)
    expected, expected_log_probs = inverse_cdf(logits, uniforms)
    alike = tokens == expected  # a uniform may fall between two roundings of the distribution
    assert alike.float().mean() > 0.9
    torch.testing.assert_close(log_probs[alike], expected_log_probs[alike], rtol=0, atol=2e-5)
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("vocabulary", [5, 300, 5_000])
@pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, 1 - 1e-15, BELOW_ONE])
def test_it_draws_no_token_of_probability_zero(vocabulary: int, u: float, draw: Draw) -> None:
    rows = []
    for allowed in ([2], [vocabulary - 1], [0], [1, 3], [vocabulary - 2, 2]):
        row = torch.full((vocabulary,), -torch.inf)
        row[allowed] = normals(len(allowed))
        rows.append(row)
    underflow = torch.full((vocabulary,), -500.0)
    underflow[3] = 0.0
    logits = torch.stack([*rows, underflow])
    tokens, log_probs = draw(logits, torch.full((len(logits),), u, dtype=torch.float64))
    assert (logits.softmax(-1).gather(1, tokens[:, None]) > 0).all()
    assert tokens[:3].tolist() == [2, vocabulary - 1, 0]
    assert log_probs[:3].tolist() == [0.0, 0.0, 0.0]
    assert tokens[-1] == 3


def test_evenly_spread_uniforms_give_the_exact_frequencies(draw: Draw) -> None:
    n = 2_000
    logits = normals(1, 600) / 2
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = draw(logits.expand(n, -1), uniforms)
    counts = torch.bincount(tokens, minlength=600)
    assert (counts - n * logits.double().softmax(-1)[0]).abs().max() <= 1.01


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_of_no_distribution_give_a_log_prob_of_nan(value: float, draw: Draw) -> None:
    logits = normals(3, 700)
    logits[0, 500] = value
    logits[1] = value
    tokens, log_probs = draw(logits, uniforms_of(3))
    assert ((tokens >= 0) & (tokens < 700)).all()
    assert log_probs.isnan().tolist() == [value != -math.inf, True, False]


@pytest.mark.parametrize("read", [(True, True), (True, False), (False, True)], ids=["both", "log-probs", "entropies"])
@pytest.mark.parametrize("vocabulary", [1, 7, 600, 9_001])
def test_log_probs_entropies_and_their_gradient(vocabulary: int, read: tuple[bool, bool], device: str) -> None:
    from lmgym.models import distribution_kernels as kernels

    logits = normals(6, vocabulary + 3)[:, :vocabulary]
    if vocabulary > 100:
        logits[:, 17:90] = -torch.inf
    tokens = (uniforms_of(6) * min(vocabulary, 17)).long()
    weights = [normals(6) if is_read else None for is_read in read]
    exact = logits.double().requires_grad_()
    expected = log_probs_and_entropies(exact, tokens)  # float64: by plain operations
    sum((x * w).sum() for x, w in zip(expected, weights, strict=True) if w is not None).backward()
    *found, normalisers = kernels.log_probs_and_entropies(logits.to(device), tokens.to(device))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.cpu().double(), y.detach(), rtol=0, atol=2e-5)
    slopes = [w if w is None else w.to(device) for w in weights]
    gradient = kernels.gradient_of_log_probs_and_entropies(
        logits.to(device), tokens.to(device), found[1], normalisers, *slopes
    )
    assert exact.grad is not None
    torch.testing.assert_close(gradient.cpu().double(), exact.grad, rtol=0, atol=2e-5)


def test_a_token_outside_the_support_has_a_log_prob_of_minus_infinity(device: str) -> None:
    from lmgym.models import distribution_kernels as kernels

    logits = normals(2, 50)
    logits[:, 3] = -torch.inf
    found, entropies, _ = kernels.log_probs_and_entropies(logits.to(device), torch.tensor([3, 4], device=device))
    assert found.isinf().tolist() == [True, False]
    assert entropies.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_takes_them(dtype: torch.dtype) -> None:
    logits = normals(8, 5_000).to(dtype)
    uniforms = uniforms_of(8)
    assert find_kernels(logits.cuda()) is not None
    tokens, log_probs = Sampler().sample(logits.cuda(), 0, uniforms)
    expected, expected_log_probs = Sampler().sample(logits, 0, uniforms)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(log_probs.cpu(), expected_log_probs, rtol=0, atol=2e-5)
    gradients = []
    for x in (logits.clone(), logits.cuda()):
        x.requires_grad_()
        sum(log_probs_and_entropies(x, expected.to(x.device))).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
