"""How tokens are drawn: exact frequencies, exact log-probs, and no token of probability 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.models.sampling import Sampler, inverse_cdf

BELOW_ONE = math.nextafter(1.0, 0.0)


def logits_of(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- inverse_cdf -----------------------------------------------------------------------------------------------------


def slow_inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Walks along the cumulative distribution, in double precision."""
    tokens = []
    for row, u in zip(logits.double().softmax(-1).tolist(), uniforms.tolist(), strict=True):
        mass = 0.0
        token = 0
        for i, p in enumerate(row):
            if p > 0:
                token = i
                mass += p
                if u < mass:
                    break
        tokens.append(token)
    return torch.tensor(tokens)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 255, 256, 257, 512, 1000])
def test_inverse_cdf_is_a_walk_along_the_distribution(vocabulary: int) -> None:
    logits = logits_of(400, vocabulary)
    uniforms = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, log_probs = inverse_cdf(logits, uniforms)
    assert torch.equal(tokens, slow_inverse_cdf(logits, uniforms))
    assert tokens.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-5)


def test_evenly_spread_uniforms_give_the_exact_frequencies() -> None:
    n = 20_000
    logits = logits_of(300, scale=1.5)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = inverse_cdf(logits.expand(n, -1), uniforms)
    counts = torch.bincount(tokens, minlength=300)
    assert (counts - n * logits.double().softmax(-1)).abs().max() <= 1  # a grid misses each interval by one at most


def test_random_uniforms_give_the_frequencies_within_their_error() -> None:
    n = 60_000
    probs = logits_of(40).softmax(-1).double()
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, _ = inverse_cdf(probs.log().float().expand(n, -1), uniforms)
    counts = torch.bincount(tokens, minlength=40)
    error = (probs * (1 - probs) / n).sqrt()
    assert ((counts / n - probs).abs() < 4.5 * error).all()
    statistic = ((counts - n * probs) ** 2 / (n * probs)).sum().item()
    degrees = 39
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("vocabulary", [5, 256, 300, 513])
@pytest.mark.parametrize("u", [0.0, 5e-324, 1e-300, 0.5, 1 - 1e-9, 1 - 1e-15, BELOW_ONE])
def test_never_a_token_of_probability_zero(vocabulary: int, u: float) -> None:
    """Impossible tokens first, last, at block edges, and in whole blocks."""
    rows = []
    for allowed in ([2], [vocabulary - 1], [0], [1, 3], [vocabulary - 2, 2]):
        row = torch.full((vocabulary,), -torch.inf)
        row[allowed] = logits_of(len(allowed))
        rows.append(row)
    underflow = torch.full((vocabulary,), -500.0)  # exp underflows to 0: as good as impossible
    underflow[3] = 0.0
    rows.append(underflow)
    logits = torch.stack(rows)
    tokens, log_probs = inverse_cdf(logits, torch.full((len(rows),), u, dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    assert (logits.softmax(-1).gather(1, tokens[:, None]) > 0).all()
    assert log_probs.isfinite().all()
    assert tokens[:3].tolist() == [2, vocabulary - 1, 0]
    assert log_probs[:3].tolist() == [0.0, 0.0, 0.0]
    assert tokens[-1] == 3


def test_a_long_tail_is_not_lost_to_rounding() -> None:
    """200,000 tokens share half of the mass; in float32 their sum would stop growing long before."""
    vocabulary = 200_001
    logits = torch.zeros((1, vocabulary))
    logits[0, 0] = math.log(vocabulary - 1)
    n = 200
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    found = torch.cat([inverse_cdf(logits, u[None])[0] for u in uniforms])
    assert (found == 0).sum() == n // 2
    expected = 1 + (2 * uniforms[n // 2 :] - 1) * (vocabulary - 1)
    assert (found[n // 2 :] - expected).abs().max() < 3


def test_a_row_depends_on_its_own_logits_and_uniform_alone() -> None:
    logits = logits_of(9, 400)
    uniforms = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens, log_probs = inverse_cdf(logits, uniforms)
    for row in range(9):
        one, log_prob = inverse_cdf(logits[row : row + 1], uniforms[row : row + 1])
        assert one == tokens[row]
        torch.testing.assert_close(log_prob, log_probs[row : row + 1])


def test_inputs_are_left_alone() -> None:
    logits = logits_of(3, 300)
    uniforms = torch.full((3,), 0.3, dtype=torch.float64)
    before = logits.clone()
    for sampler in (Sampler(), Sampler(temperature=0.5), Sampler(top_k=3), Sampler(top_p=0.5), Sampler(temperature=0)):
        sampler.sample(logits, 0, uniforms)
    assert torch.equal(logits, before)


# --- distributions -------------------------------------------------------------------------------------------------


def slow_probs(logits: list[float], sampler: Sampler, t: int) -> list[float]:
    """Probabilities of one row, spelled out."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if sampler.temperature == 0 or t < sampler.greedy_tokens:
        return [float(i == order[0]) for i in range(len(logits))]
    weights = [math.exp((x - logits[order[0]]) / sampler.temperature) for x in logits]
    kept = order[: sampler.top_k or None]
    if sampler.top_p < 1:
        total = sum(weights[i] for i in kept)
        mass = 0.0
        smallest = []
        for i in kept:
            smallest.append(i)
            mass += weights[i] / total
            if mass >= sampler.top_p:
                break
        kept = smallest
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


SAMPLERS = [
    Sampler(),
    Sampler(temperature=0),
    Sampler(temperature=0.7),
    Sampler(temperature=3.0),
    Sampler(top_k=1),
    Sampler(top_k=5),
    Sampler(top_k=1000),
    Sampler(top_p=0.8),
    Sampler(top_p=0.05),
    Sampler(greedy_tokens=2),
    Sampler(temperature=0.6, top_k=12, top_p=0.9),
    Sampler(temperature=1.5, top_p=0.95, greedy_tokens=1),
]


@pytest.mark.parametrize("t", [0, 1, 2, 9])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_the_distribution_is_the_slow_one_and_log_probs_are_its_own(sampler: Sampler, t: int) -> None:
    rows = 60
    vocabulary = 30
    logits = logits_of(rows, vocabulary, seed=t)
    adjusted = sampler.adjust_logits(logits, t)
    slow = torch.tensor([slow_probs(row, sampler, t) for row in logits.double().tolist()])
    torch.testing.assert_close(adjusted.softmax(-1), slow, rtol=0, atol=1e-6)
    assert torch.equal(adjusted > -torch.inf, slow > 0)
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    tokens, log_probs = sampler.sample(logits, t, uniforms)
    expected = adjusted.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert expected.isfinite().all()
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(sampler.log_distribution(logits, torch.full((rows,), t)), adjusted.log_softmax(-1))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_frequencies_are_those_of_the_distribution(sampler: Sampler) -> None:
    n = 20_000
    t = 1
    logits = logits_of(30, seed=4)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = sampler.sample(logits.expand(n, -1), t, uniforms)
    probs = torch.tensor(slow_probs(logits.double().tolist(), sampler, t))
    assert (torch.bincount(tokens, minlength=30) - n * probs).abs().max() <= 1


def test_the_log_prob_of_another_distribution_is_another() -> None:
    """A log-prob that forgets the temperature, or the cut, is off by far more than rounding."""
    logits = logits_of(50, 30)
    uniforms = torch.full((50,), 0.4, dtype=torch.float64)
    for sampler in (Sampler(temperature=0.5), Sampler(top_k=3), Sampler(top_p=0.6)):
        tokens, log_probs = sampler.sample(logits, 0, uniforms)
        plain = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        assert (log_probs - plain).abs().mean() > 0.1


def test_log_distribution_at_mixed_positions() -> None:
    sampler = Sampler(temperature=0.8, top_k=4, greedy_tokens=3)
    logits = logits_of(8, 20)
    positions = torch.tensor([0, 5, 2, 3, 9, 1, 4, 2])
    found = sampler.log_distribution(logits, positions)
    for row, t in enumerate(positions.tolist()):
        torch.testing.assert_close(found[row], sampler.adjust_logits(logits[row : row + 1], t)[0].log_softmax(-1))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(8))


@pytest.mark.parametrize("sampler", [Sampler(temperature=0.5), Sampler(top_k=4, top_p=0.9), Sampler(greedy_tokens=2)])
def test_log_distribution_is_differentiable(sampler: Sampler) -> None:
    logits = logits_of(6, 12).double().requires_grad_()
    positions = torch.tensor([0, 1, 2, 3, 4, 5])
    log_probs = sampler.log_distribution(logits, positions)
    best = log_probs.argmax(-1, keepdim=True)
    log_probs.gather(1, best).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    probs = log_probs.detach().exp().double()
    expected = (torch.zeros_like(probs).scatter(1, best, 1.0) - probs) / sampler.temperature
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_ties_are_cut_to_exactly_k_and_the_smallest_set() -> None:
    logits = torch.zeros((2, 10))
    assert (Sampler(top_k=3).adjust_logits(logits, 0) > -torch.inf).sum(-1).tolist() == [3, 3]
    assert (Sampler(top_p=0.5).adjust_logits(logits, 0) > -torch.inf).sum(-1).tolist() == [5, 5]
    assert (Sampler(top_p=0.51).adjust_logits(logits, 0) > -torch.inf).sum(-1).tolist() == [6, 6]


def test_top_p_never_keeps_a_token_that_was_impossible() -> None:
    logits = logits_of(4, 12)
    logits[:, 3:] = -torch.inf
    for sampler in (Sampler(top_p=0.9999), Sampler(top_k=8), Sampler(temperature=5.0)):
        kept = sampler.adjust_logits(logits, 0) > -torch.inf
        assert not kept[:, 3:].any()
        assert kept.any(-1).all()


def test_half_precision_logits_are_drawn_in_float32() -> None:
    logits = logits_of(5, 300).bfloat16()
    tokens, log_probs = Sampler().sample(logits, 0, torch.full((5,), 0.7, dtype=torch.float64))
    expected = logits.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)


def test_no_global_generator_is_read() -> None:
    state = torch.random.get_rng_state()
    Sampler(top_p=0.9).sample(logits_of(4, 30), 0, torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "`temperature` must be a finite number >= 0, got -1.0."),
        ({"temperature": math.nan}, "`temperature` must be a finite number >= 0, got nan."),
        ({"top_k": -1}, "`top_k` must be an int >= 0, got -1."),
        ({"top_k": 2.0}, "`top_k` must be an int >= 0, got 2.0."),
        ({"top_p": 0.0}, "`top_p` must be a finite number > 0 and <= 1, got 0.0."),
        ({"top_p": 1.1}, "`top_p` must be a finite number > 0 and <= 1, got 1.1."),
        ({"greedy_tokens": True}, "`greedy_tokens` must be an int >= 0, got True."),
    ],
)
def test_bad_samplers_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Sampler(**arguments)  # type: ignore[arg-type]
