"""Losses against closed forms and autograd: values, gradients, and where the gradient must be exactly zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agents.losses import (
    KLEstimator,
    clipped_policy_loss,
    clipped_sequence_loss,
    clipped_value_loss,
    clipped_weight_loss,
    explained_variance,
    kl_estimate,
    kl_to_go,
    policy_gradient_loss,
    response_means,
    soft_gated_loss,
    value_loss,
)

EPS = 0.2


def of_one_token(ratio: float, advantage: float, clip_range: float = EPS) -> tuple[float, float, float]:
    """Loss, its derivative by log pi, and the clip fraction of one token."""
    old = torch.tensor([-1.3], dtype=torch.float64)
    log_prob = (old + math.log(ratio)).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    result = clipped_policy_loss(log_prob, old, advantage * one, one, clip_range)
    result.loss.backward()
    assert log_prob.grad is not None
    return result.loss.item(), log_prob.grad.item(), result.clip_fraction.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        # A better action: worth no more than 1 + eps, so there is nothing left to gain beyond it.
        (1.5, 2.0, -2.0 * (1 + EPS), 0.0, 1.0),
        (1.1, 2.0, -2.0 * 1.1, -2.0 * 1.1, 0.0),
        (0.5, 2.0, -2.0 * 0.5, -2.0 * 0.5, 0.0),  # its probability fell: the way back is open however far it is
        # A worse action: below 1 - eps it has been pushed down enough.
        (0.5, -2.0, 2.0 * (1 - EPS), 0.0, 1.0),
        (0.9, -2.0, 2.0 * 0.9, 2.0 * 0.9, 0.0),
        (1.5, -2.0, 2.0 * 1.5, 2.0 * 1.5, 0.0),  # its probability rose: the loss is not bounded above
    ],
)
def test_the_clipped_surrogate_in_each_quadrant(
    ratio: float, advantage: float, loss: float, slope: float, clipped: float
) -> None:
    got_loss, got_slope, got_clipped = of_one_token(ratio, advantage)
    assert got_loss == pytest.approx(loss, abs=1e-12)
    assert got_slope == pytest.approx(slope, abs=1e-12)
    assert got_clipped == clipped
    if slope == 0.0:
        assert got_slope == 0.0  # not small: nothing


def objective(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    """The clipped surrogate of one token, case by case."""
    if advantage >= 0:
        return min(ratio, 1 + high) * advantage
    held = max(ratio, 1 - low)
    return (held if dual is None else min(held, dual)) * advantage


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.25, 1.5, 2.9, 3.1])
@pytest.mark.parametrize(("high", "dual"), [(None, None), (0.28, None), (None, 3.0), (0.28, 3.0)])
def test_the_upper_clip_and_the_dual_clip(
    ratio: float, advantage: float, high: float | None, dual: float | None
) -> None:
    old = torch.tensor([-4.0], dtype=torch.float64)
    log_prob = (old + math.log(ratio)).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    result = clipped_policy_loss(log_prob, old, advantage * one, one, EPS, high, dual)
    expected = objective(ratio, advantage, EPS, EPS if high is None else high, dual)
    assert result.loss.item() == pytest.approx(-expected, abs=1e-12)
    result.loss.backward()
    assert log_prob.grad is not None
    free = expected == pytest.approx(ratio * advantage)
    assert log_prob.grad.item() == pytest.approx(-ratio * advantage if free else 0.0, abs=1e-12)
    assert result.clip_fraction.item() == (not free)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 2.0), (0.5, -2.0)])
def test_a_clipped_token_gives_every_parameter_after_it_exactly_no_gradient(ratio: float, advantage: float) -> None:
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    log_probs = logits.log_softmax(-1)[1:2]
    one = torch.ones(1, dtype=torch.float64)
    clipped_policy_loss(log_probs, log_probs.detach() - math.log(ratio), advantage * one, one, EPS).loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_at_ratio_one_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((7, 5), generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (7, 1), generator=generator)
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    log_probs = logits.log_softmax(-1).gather(1, tokens).squeeze(1)
    surrogate = clipped_policy_loss(log_probs, log_probs.detach(), advantages, weights, EPS)
    (clipped,) = torch.autograd.grad(surrogate.loss, logits, retain_graph=True)
    (plain,) = torch.autograd.grad(-(weights * advantages * log_probs).sum(), logits)
    torch.testing.assert_close(clipped, plain, rtol=0, atol=1e-14)
    assert plain.abs().max() > 0.1
    assert surrogate.loss.item() == pytest.approx(-(weights * advantages).sum().item())
    assert surrogate.clip_fraction == 0
    assert surrogate.approx_kl == 0


def tokens(n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, generator=generator, dtype=torch.float64) * 3
    new = old + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
    advantages, weights = torch.randn((2, n), generator=generator, dtype=torch.float64)
    return new, old, advantages, weights.abs() / weights.abs().sum()


def test_the_surrogate_is_pessimistic_and_weighted() -> None:
    new, old, advantages, weights = tokens()
    ratio = (new - old).exp()
    result = clipped_policy_loss(new, old, advantages, weights, EPS)
    expected = 0.0
    clipped = 0.0
    kl = 0.0
    for r, a, w in zip(ratio.tolist(), advantages.tolist(), weights.tolist(), strict=True):
        kept = min(max(r, 1 - EPS), 1 + EPS)
        expected -= w * min(r * a, kept * a)
        clipped += w * (kept * a < r * a)
        kl += w * (r - 1 - math.log(r))
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert result.clip_fraction.item() == pytest.approx(clipped, abs=1e-12)
    assert result.approx_kl.item() == pytest.approx(kl, abs=1e-12)
    assert 0 < clipped < 1
    assert result.loss > -(weights * ratio * advantages).sum()  # never better than the surrogate that is not clipped


def test_metrics_carry_no_gradient() -> None:
    new, old, advantages, weights = tokens()
    result = clipped_policy_loss(new.requires_grad_(), old, advantages, weights, EPS)
    assert result.loss.requires_grad
    assert not result.clip_fraction.requires_grad
    assert not result.approx_kl.requires_grad


def test_approx_kl_is_an_unbiased_estimate_of_the_kl_from_the_old_policy_to_the_new() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn((2, 5), generator=generator, dtype=torch.float64).log_softmax(-1)
    zero = torch.zeros(5, dtype=torch.float64)
    # Weighting each token with its probability takes the expectation exactly.
    got = clipped_policy_loss(new, old, zero, old.exp(), EPS).approx_kl.item()
    forward = (old.exp() * (old - new)).sum().item()
    backward = (new.exp() * (new - old)).sum().item()
    assert got == pytest.approx(forward, abs=1e-12)
    assert abs(got - backward) > 0.01


def test_weights_choose_the_mean() -> None:
    new, old, advantages, _ = tokens(6)
    each = [of_one_token((n - o).exp().item(), a.item())[0] for n, o, a in zip(new, old, advantages, strict=True)]
    over_tokens = clipped_policy_loss(new, old, advantages, torch.full((6,), 1 / 6), EPS).loss.item()
    assert over_tokens == pytest.approx(sum(each) / 6)
    lengths = torch.tensor([1.0, 2, 2, 3, 3, 3])  # three episodes of 1, 2 and 3 tokens
    over_episodes = clipped_policy_loss(new, old, advantages, 1 / (3 * lengths), EPS).loss.item()
    assert over_episodes == pytest.approx((each[0] + sum(each[1:3]) / 2 + sum(each[3:]) / 3) / 3)
    assert abs(over_tokens - over_episodes) > 1e-3


# -- other ratios ----------------------------------------------------------------------------------------------------


def test_the_mean_of_a_response_reaches_its_tokens_alone() -> None:
    """The last row is a copy, as where shorter rows are filled up; a loss has no weight for it."""
    lengths = torch.tensor([2, 2, 1, 3, 3, 3, 3])
    positions = torch.tensor([0, 1, 0, 0, 1, 2, 2])
    is_token = torch.tensor([True] * 6 + [False])
    x = torch.tensor([1.0, 3, 5, 1, 2, 6, 6], dtype=torch.float64, requires_grad=True)
    means = response_means(x, positions, lengths, is_token)
    assert means[:6].tolist() == [2, 2, 5, 3, 3, 3]
    (slope,) = torch.autograd.grad((means[:6] * torch.arange(1, 7)).sum(), x)
    assert slope.tolist() == pytest.approx([1.5, 1.5, 3, 5, 5, 5, 0])


def test_the_sequence_surrogate_clips_whole_responses() -> None:
    """Slow twin: the geometric mean of a response's ratios, and its objective case by case (GSPO, eqs. 5 and 7)."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 4, 2, 3, 5, 2]
    gains = [2.0, -1.0, 0.5, -2.0, 1.0, -0.5]
    lengths = torch.tensor([n for n in sizes for _ in range(n)])
    positions = torch.tensor([t for n in sizes for t in range(n)])
    old = -torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    new = (old + 0.3 * torch.randn(len(old), generator=generator, dtype=torch.float64)).requires_grad_()
    log_ratios = response_means(new - old, positions, lengths, torch.ones(len(old), dtype=torch.bool))
    advantages = torch.tensor([a for n, a in zip(sizes, gains, strict=True) for _ in range(n)])
    found = clipped_sequence_loss(log_ratios, advantages, 1 / (6 * lengths.double()), 0.1, 0.2)
    expected = 0.0
    clipped = 0.0
    slopes = []
    start = 0
    for n, gain in zip(sizes, gains, strict=True):
        s = math.exp(sum((new - old)[start : start + n].tolist()) / n)
        reached = objective(s, gain, 0.1, 0.2, None)
        free = reached == pytest.approx(s * gain)
        expected -= reached / 6
        clipped += (not free) / 6
        slopes += [-s * gain / n / 6 if free else 0.0] * n
        start += n
    assert found.loss.item() == pytest.approx(expected)
    assert found.clip_fraction.item() == pytest.approx(clipped)
    assert 0 < clipped < 1
    (slope,) = torch.autograd.grad(found.loss, new)
    assert slope.tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("low", [None, 0.3])
def test_the_clipped_weight_leaves_every_token_its_gradient(low: float | None) -> None:
    new, old, advantages, weights = tokens()
    found = clipped_weight_loss(new.requires_grad_(), old, advantages, weights, 0.25, low)
    loss = 0.0
    slopes = []
    clipped = 0.0
    for n, o, a, w in zip(new.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True):
        ratio = math.exp(n - o)
        held = max(min(ratio, 1.25), 0.0 if low is None else 1 - low)
        loss -= w * held * a * n
        slopes.append(-w * held * a)
        clipped += w * (held != ratio)
    assert found.loss.item() == pytest.approx(loss)
    assert found.clip_fraction.item() == pytest.approx(clipped)
    (slope,) = torch.autograd.grad(found.loss, new)
    assert slope.tolist() == pytest.approx(slopes)
    assert slope.abs().min() > 0
    # What PPO clips, has none.
    (hard,) = torch.autograd.grad(clipped_policy_loss(new, old, advantages, weights, 0.25).loss, new)
    assert (hard == 0).any()


def test_the_soft_gate_is_its_formula_and_its_slope_falls_away_from_ratio_1() -> None:
    new, old, advantages, weights = tokens()
    found = soft_gated_loss(new.requires_grad_(), old, advantages, weights, 1.0, 4.0)
    loss = 0.0
    gate = 0.0
    slopes = []
    for n, o, a, w in zip(new.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True):
        ratio = math.exp(n - o)
        tau = 1.0 if a > 0 else 4.0
        share = 1 / (1 + math.exp(-tau * (ratio - 1)))
        loss -= w * a * share * 4 / tau
        gate += w * 4 * share * (1 - share)
        slopes.append(-w * a * ratio / math.cosh(tau * (ratio - 1) / 2) ** 2)
    assert found.loss.item() == pytest.approx(loss)
    assert found.gate.item() == pytest.approx(gate)
    (slope,) = torch.autograd.grad(found.loss, new)
    assert slope.tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_at_ratio_one_the_gate_is_open_whatever_its_temperature(tau: float, advantage: float) -> None:
    old = torch.tensor([-1.3], dtype=torch.float64)
    new = old.clone().requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    found = soft_gated_loss(new, old, advantage * one, one, tau, tau)
    found.loss.backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(-advantage)
    assert found.gate.item() == pytest.approx(1)


def test_the_gate_of_a_negative_advantage_has_its_own_temperature() -> None:
    old = torch.tensor([-1.3, -1.3], dtype=torch.float64)
    new = (old + math.log(2)).requires_grad_()
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    soft_gated_loss(new, old, advantages, torch.ones_like(old), 1.0, 3.0).loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-2 / math.cosh(0.5) ** 2, 2 / math.cosh(1.5) ** 2])


# -- the critic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, -0.9),  # within the range: the plain error
        (0.9, 0.0, 1.0, 0.5 * (1 - EPS) ** 2, 0.0),  # ran towards the target: counts as if it had stopped at the edge
        (-0.9, 0.0, 1.0, 0.5 * 1.9**2, -1.9),  # ran away from it: pays in full, and can come back
        (1.9, 0.0, 1.0, 0.5 * 0.9**2, 0.9),  # ran past it, further than the edge lies before it
        (0.4, 0.0, 0.1, 0.5 * 0.3**2, 0.3),
    ],
)
def test_the_value_loss_takes_the_worse_of_the_two_errors(
    value: float, old: float, target: float, loss: float, slope: float
) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    result = clipped_value_loss(values, old * one, target * one, one, EPS)
    result.backward()
    assert values.grad is not None
    assert result.item() == pytest.approx(loss, abs=1e-12)
    assert values.grad.item() == pytest.approx(slope, abs=1e-12)


def test_the_value_loss_without_a_range_is_half_the_weighted_squared_error() -> None:
    values, old, returns, weights = tokens()
    plain = clipped_value_loss(values, old, returns, weights, None).item()
    expected = 0.5 * sum(
        w * (v - r) ** 2 for v, r, w in zip(values.tolist(), returns.tolist(), weights.tolist(), strict=True)
    )
    assert plain == pytest.approx(expected, abs=1e-12)
    assert clipped_value_loss(values, old, returns, weights, EPS).item() > plain  # pessimism never pays
    assert clipped_value_loss(values, old, returns, weights, 1e9).item() == pytest.approx(plain)


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 3, returns) == pytest.approx(1.0)  # a constant error explains as much
    assert explained_variance(torch.full((4,), 5.0), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)  # 1 - Var[2 r] / Var[r]
    assert explained_variance(0.5 * returns, returns) == pytest.approx(0.75)
    assert math.isnan(explained_variance(returns, torch.ones(4)))


# -- without a ratio -------------------------------------------------------------------------------------------------


def test_the_policy_gradient_loss_is_a_weighted_sum_and_its_slope_the_advantages() -> None:
    log_probs, _, advantages, weights = tokens()
    loss = policy_gradient_loss(log_probs.requires_grad_(), advantages, weights)
    columns = (x.tolist() for x in (log_probs.detach(), advantages, weights))
    assert loss.item() == pytest.approx(-sum(w * a * x for x, a, w in zip(*columns, strict=True)), abs=1e-12)
    (slope,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(slope, -weights * advantages, rtol=0, atol=1e-14)


def test_the_value_loss_is_half_the_weighted_squared_error() -> None:
    values, _, returns, weights = tokens()
    loss = value_loss(values.requires_grad_(), returns, weights)
    columns = (x.tolist() for x in (values.detach(), returns, weights))
    assert loss.item() == pytest.approx(0.5 * sum(w * (v - r) ** 2 for v, r, w in zip(*columns, strict=True)))
    (slope,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(slope, weights * (values - returns).detach(), rtol=0, atol=1e-14)
    assert value_loss(values, values, weights).item() == 0


# -- the KL as a loss ------------------------------------------------------------------------------------------------


def kl_problem(n: int = 6, v: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, V) of the policy, log-probs (n, V) of the reference and tokens (n, 1)."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn((2, n, v), generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1), torch.randint(v, (n, 1), generator=generator)


def estimated(kind: KLEstimator, logits: Tensor, ref: Tensor, chosen: Tensor) -> Tensor:
    log_pi = logits.log_softmax(-1)
    return kl_estimate(kind, log_pi.gather(1, chosen).squeeze(1), ref.gather(1, chosen).squeeze(1), log_pi, ref)


KINDS: list[KLEstimator] = ["k1", "k2", "k3", "exact"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_of_the_kl_is_its_formula_token_by_token(kind: KLEstimator) -> None:
    logits, ref, chosen = kl_problem()
    log_pi = logits.detach().log_softmax(-1)
    for i, found in enumerate(estimated(kind, logits, ref, chosen).tolist()):
        x = (log_pi[i, chosen[i]] - ref[i, chosen[i]]).item()
        whole = sum(math.exp(p) * (p - q) for p, q in zip(log_pi[i].tolist(), ref[i].tolist(), strict=True))
        assert found == pytest.approx({"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x, "exact": whole}[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_an_estimate_of_the_kl_by_finite_differences(kind: KLEstimator) -> None:
    logits, ref, chosen = kl_problem()
    (found,) = torch.autograd.grad(estimated(kind, logits, ref, chosen).sum(), logits)
    plain = logits.detach()
    for i, j in ((0, 0), (2, 3), (5, int(chosen[5])), (3, int(chosen[3]))):
        step = torch.zeros_like(plain)
        step[i, j] = 1e-6
        ends = [estimated(kind, plain + sign * step, ref, chosen).sum().item() for sign in (1, -1)]
        assert found[i, j].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_gradient_of_an_estimate_of_the_kl_is_in_expectation(kind: KLEstimator) -> None:
    """Of one state: 0 for k1, that of KL(pi || ref) for k2 and exact, that of KL(ref || pi) for k3."""
    logits, ref, _ = kl_problem(n=1)
    every = torch.arange(5).unsqueeze(1)
    probs = logits.detach().softmax(-1).squeeze(0)
    expected = (probs * estimated(kind, logits.expand(5, 5), ref.expand(5, 5), every)).sum()
    (found,) = torch.autograd.grad(expected, logits)
    log_pi = logits.log_softmax(-1)
    (right,) = torch.autograd.grad((log_pi.exp() * (log_pi - ref)).sum(), logits)
    log_pi = logits.log_softmax(-1)
    (other,) = torch.autograd.grad((ref.exp() * (ref - log_pi)).sum(), logits)
    truth = {"k1": torch.zeros_like(right), "k2": right, "k3": other, "exact": right}[kind]
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    assert (right - other).norm() > 0.1


def test_k2_to_go_has_the_gradient_of_the_kl_of_responses() -> None:
    """Over every response of one token (an end) or two; k2 a token leaves out the KL of the second state."""
    generator = torch.Generator().manual_seed(5)
    logits, ref = torch.randn((2, 4, 3), generator=generator, dtype=torch.float64)  # of the first token, and after each
    logits.requires_grad_()
    log_pi = logits.log_softmax(-1)
    log_ref = ref.log_softmax(-1)
    responses = [[0], *([a, b] for a in (1, 2) for b in range(3))]
    states = torch.tensor([state for y in responses for state in ([0] if len(y) == 1 else [0, 1 + y[0]])])
    tokens = torch.tensor([token for y in responses for token in y])
    positions = torch.tensor([t for y in responses for t in range(len(y))])
    lengths = torch.tensor([len(y) for y in responses for _ in y])
    row = torch.tensor([i for i, y in enumerate(responses) for _ in y])
    own = log_pi[states, tokens]
    other = log_ref[states, tokens]
    log_probs = torch.zeros(len(responses), dtype=torch.float64).index_add(0, row, own)
    ratios = torch.zeros_like(log_probs).index_add(0, row, own - other)
    weights = log_probs.detach().exp()[row]
    right = torch.autograd.grad((log_probs.exp() * ratios).sum(), logits, retain_graph=True)[0]
    found = (weights * kl_to_go(own, other, positions, lengths)).sum()
    assert found.item() == pytest.approx((log_probs.exp() * ratios).sum().item())
    torch.testing.assert_close(torch.autograd.grad(found, logits, retain_graph=True)[0], right)
    a_token = (weights * kl_estimate("k2", own, other, log_pi, log_ref)).sum()
    assert (torch.autograd.grad(a_token, logits)[0] - right).norm() > 0.05 * right.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_no_kl_to_itself(kind: KLEstimator) -> None:
    logits, _, chosen = kl_problem()
    found = estimated(kind, logits, logits.detach().log_softmax(-1), chosen)
    assert found.abs().max() < 1e-12
    if kind != "k1":  # each is least there
        (slope,) = torch.autograd.grad(found.sum(), logits)
        assert slope.abs().max() < 1e-12


def test_a_token_that_the_distribution_rules_out_adds_nothing_to_the_exact_kl() -> None:
    logits, ref, chosen = kl_problem()
    ruled_out = logits.masked_fill(torch.arange(5) == (chosen + 1) % 5, -torch.inf)
    found = estimated("exact", ruled_out, ref, chosen)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chosen_token_that_left_the_support_adds_nothing_to_a_loss(kind: KLEstimator) -> None:
    logits, ref, chosen = kl_problem()
    gone = torch.zeros(6, 5, dtype=torch.bool)
    gone[2, chosen[2]] = True
    log_pi = logits.masked_fill(gone, -torch.inf).log_softmax(-1)
    log_probs = log_pi.gather(1, chosen).squeeze(1)
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    advantages = torch.tensor([1.0, -2, 3, -4, 5, -6])
    kl = kl_estimate(kind, log_probs, ref.gather(1, chosen).squeeze(1), log_pi, ref)
    assert kind == "exact" or kl[2] == 0
    loss = policy_gradient_loss(log_probs, advantages, weights) + kl.sum()
    (slope,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert slope.isfinite().all()
    assert kind == "exact" or (slope[2] == 0).all()
    assert slope[3].norm() > 0
