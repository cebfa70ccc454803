"""KL estimators, the reward they make and its coefficient, against enumeration and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmgym import kl
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LogProbError

TOKENS = 5


def distributions(seed: int, rows: int = 7) -> tuple[Tensor, Tensor]:
    """(rows, V) log-probs in float64 of a policy and of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((2, rows, TOKENS), generator=generator, dtype=torch.float64) * 1.5
    return tuple(logits.log_softmax(-1))


def slow_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The definition, a token at a time; 0 log 0 is 0."""
    result = torch.zeros(len(log_probs), dtype=torch.float64)
    for row, (pi, ref) in enumerate(zip(log_probs.tolist(), ref_log_probs.tolist(), strict=True)):
        result[row] = sum(math.exp(p) * (p - r) for p, r in zip(pi, ref, strict=True) if p > -math.inf)
    return result


def expectation(estimator: object, pi: Tensor, ref: Tensor) -> Tensor:
    """E_{a ~ pi} of an estimator, by enumeration."""
    return (pi.exp() * estimator(pi - ref)).sum(-1)  # type: ignore[operator]


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_k1_and_k3_are_unbiased(estimator: object) -> None:
    pi, ref = distributions(0)
    torch.testing.assert_close(expectation(estimator, pi, ref), slow_kl(pi, ref), rtol=1e-12, atol=1e-12)


def test_an_estimator_of_the_wrong_sign_or_direction_is_not() -> None:
    pi, ref = distributions(1)
    true = slow_kl(pi, ref)
    assert (true > 0.05).all()  # so that what follows means something
    for wrong in (lambda x: -kl.k1(x), lambda x: kl.k1(-x), lambda x: kl.k3(-x)):
        assert ((expectation(wrong, pi, ref) - true).abs() > 0.01).all()
    assert ((slow_kl(ref, pi) - true).abs() > 1e-3).all()


def test_k2_is_half_the_mean_square_and_its_gradient_that_of_the_kl() -> None:
    pi, ref = distributions(2)
    torch.testing.assert_close(expectation(kl.k2, pi, ref), 0.5 * (pi.exp() * (pi - ref) ** 2).sum(-1))
    assert ((expectation(kl.k2, pi, ref) - slow_kl(pi, ref)).abs() > 1e-4).all()  # biased
    logits = pi.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((log_pi.exp() * (log_pi - ref)).sum(), logits)
    log_pi = logits.log_softmax(-1)
    (sampled,) = torch.autograd.grad((log_pi.detach().exp() * kl.k2(log_pi - ref)).sum(), logits)
    torch.testing.assert_close(sampled, true)


def test_signs() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    torch.testing.assert_close(kl.k1(x), x)
    assert (kl.k2(x) >= 0).all()
    assert (kl.k3(x) >= 0).all()
    # k3 is steep where the policy is less sure of the token than the reference, and not the other way round.
    assert kl.k3(torch.tensor(-3.0)) > kl.k3(torch.tensor(3.0)) > 0
    assert kl.k3(torch.tensor(1e-7, dtype=torch.float64)) == pytest.approx(0.5e-14, rel=0.1)  # no cancellation


def test_exact_is_the_sum_over_the_vocabulary() -> None:
    pi, ref = distributions(3)
    torch.testing.assert_close(kl.exact(pi, ref), slow_kl(pi, ref))
    torch.testing.assert_close(kl.exact(pi, pi), torch.zeros(len(pi), dtype=torch.float64))


def test_exact_where_the_policy_never_goes() -> None:
    pi, ref = distributions(4)
    pi[:, 2] = -torch.inf
    ref[:3, 2] = -torch.inf
    pi = pi.log_softmax(-1)
    ref = ref.log_softmax(-1)
    found = kl.exact(pi, ref)
    assert found.isfinite().all()
    torch.testing.assert_close(found, slow_kl(pi, ref))
    ref[0, 1] = -torch.inf  # the policy goes where the reference never does
    assert kl.exact(pi, ref)[0] == torch.inf


def test_entropy_is_that_of_the_enumerated_distribution() -> None:
    uniform = torch.full((1, TOKENS), -math.log(TOKENS), dtype=torch.float64)
    assert kl.entropy(uniform).item() == pytest.approx(math.log(TOKENS))
    pi, _ = distributions(5)
    pi[:, 0] = -torch.inf
    pi = pi.log_softmax(-1)
    slow = torch.tensor([-sum(math.exp(p) * p for p in row if p > -math.inf) for row in pi.tolist()])
    torch.testing.assert_close(kl.entropy(pi), slow.double())


@pytest.mark.parametrize(
    "of", [kl.entropy, lambda log_pi: kl.exact(log_pi, torch.full_like(log_pi, -math.log(TOKENS)))]
)
def test_gradients_do_not_feel_tokens_outside_the_support(of: object) -> None:
    logits, _ = distributions(6)
    inside = logits[:, 1:].clone().requires_grad_()
    gaps = torch.cat([torch.full((len(logits), 1), -torch.inf), logits[:, 1:]], dim=1).requires_grad_()
    with_gap = torch.autograd.grad(of(gaps.log_softmax(-1)).sum(), gaps)[0]  # type: ignore[operator]
    without = torch.autograd.grad(of(inside.log_softmax(-1)).sum(), inside)[0]  # type: ignore[operator]
    assert (with_gap[:, 0] == 0).all()
    torch.testing.assert_close(with_gap[:, 1:], without)


def episodes(seed: int = 0, b: int = 6, t: int = 5) -> Episodes:
    """Random episodes of ragged lengths, with garbage off the mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, t, 3, 2, t, 4])[:b]
    log_probs, ref_log_probs = -torch.rand((2, b, t), generator=generator) * 3
    return Episodes(
        prompt_ids=torch.ones((b, 2), dtype=torch.int64),
        prompt_mask=torch.ones((b, 2), dtype=torch.bool),
        response_ids=torch.ones((b, t), dtype=torch.int64),
        response_mask=torch.arange(t) < lengths[:, None],
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
        scores=torch.randn(b, generator=generator),
        values=None,
        terminated=torch.ones(b, dtype=torch.bool),
        prompt_index=torch.arange(b),
    )


def slow_rewards(batch: Episodes, kl_coef: float, dense: bool) -> Tensor:
    rewards = torch.zeros(batch.response_ids.shape)
    for i in range(len(batch)):
        last = int(batch.lengths[i]) - 1
        for t in range(last + 1):
            cost = kl_coef * float(batch.log_probs[i, t] - batch.ref_log_probs[i, t])
            rewards[i, t if dense else last] -= cost
        rewards[i, last] += float(batch.scores[i])
    return rewards


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_token_rewards_are_those_of_a_slow_loop(dense: bool, kl_coef: float) -> None:
    batch = episodes()
    found = kl.token_rewards(batch, kl_coef, dense=dense)
    torch.testing.assert_close(found, slow_rewards(batch, kl_coef, dense))
    assert (found[~batch.response_mask] == 0).all()
    if kl_coef:
        swapped = Episodes(**{**vars(batch), "log_probs": batch.ref_log_probs, "ref_log_probs": batch.log_probs})
        assert not torch.allclose(found, kl.token_rewards(swapped, kl_coef, dense=dense), atol=1e-2)


def test_the_return_at_gamma_1_is_the_score_minus_the_price_of_the_kl() -> None:
    batch = episodes(1)
    for dense in (True, False):
        returns = kl.discounted_return(kl.token_rewards(batch, 0.3, dense=dense), 1.0)
        torch.testing.assert_close(returns, batch.scores - 0.3 * kl.episode_kl(batch))


def test_discounted_return_is_that_of_a_slow_loop() -> None:
    rewards = kl.token_rewards(episodes(2), 0.3)
    slow = [sum(0.9**t * r for t, r in enumerate(row)) for row in rewards.tolist()]
    torch.testing.assert_close(kl.discounted_return(rewards, 0.9), torch.tensor(slow))


def test_a_kl_that_cannot_be_is_an_error() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator)
    noise = (noise - noise.mean()) / noise.std()  # mean 0, standard error 1 / 20
    kl.check_kl_is_plausible(noise + 1)
    kl.check_kl_is_plausible(noise - 2.9 / 20)  # noise can do that
    with pytest.raises(LogProbError, match=r"-0\.155 nats .* the tokens were not drawn with these `log_probs`"):
        kl.check_kl_is_plausible(noise - 3.1 / 20)
    kl.check_kl_is_plausible(torch.full((400,), -1e-6))  # round-off at initialisation
    with pytest.raises(LogProbError):
        kl.check_kl_is_plausible(torch.full((400,), -0.06))
    kl.check_kl_is_plausible(torch.full((40,), -0.06))  # three errors below 0, and not rare enough
    kl.check_kl_is_plausible(torch.full((200,), -0.1))  # 20 nats below 0: e^-20 is 2e-9
    with pytest.raises(LogProbError):
        kl.check_kl_is_plausible(torch.full((200,), -0.105))  # e^-21 is 8e-10
    kl.check_kl_is_plausible(torch.tensor([-50.0]))  # one number has no error


def test_a_rare_response_that_was_not_drawn_is_no_error() -> None:
    """3 % of the policy's mass went to something new: where no sample has it, every log-ratio is log 0.97."""
    kl.check_kl_is_plausible(torch.full((32,), math.log(0.97)))
    generator = torch.Generator().manual_seed(0)
    ratios = torch.tensor([math.log(0.97), math.log(0.03 / 1e-4)])
    for _ in range(500):
        kl.check_kl_is_plausible(ratios[(torch.rand(32, generator=generator) < 0.03).long()])


def test_a_forgotten_temperature_is_found() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, generator=generator) * 2
    drawn = torch.multinomial((2 * logits).softmax(-1), 4000, replacement=True, generator=generator)
    right = (2 * logits).log_softmax(-1)[drawn]
    wrong = logits.log_softmax(-1)[drawn]
    kl.check_kl_is_plausible(right - (1.5 * logits).log_softmax(-1)[drawn])
    with pytest.raises(LogProbError):
        kl.check_kl_is_plausible(wrong - (1.5 * logits).log_softmax(-1)[drawn])


def test_the_adaptive_coefficient_follows_its_closed_form() -> None:
    coefficient = kl.AdaptiveKL(0.2, target=6.0, horizon=1000.0)
    coefficient.update(6.6, 50)  # 10 % too much: a factor of 1 + 0.1 * 50 / 1000
    assert coefficient.value == pytest.approx(0.2 * 1.005)
    coefficient.update(100.0, 50)  # clipped at 20 %
    assert coefficient.value == pytest.approx(0.2 * 1.005 * 1.01)
    coefficient.update(0.0, 100)  # clipped at -20 %
    assert coefficient.value == pytest.approx(0.2 * 1.005 * 1.01 * 0.98)
    before = coefficient.value
    coefficient.update(6.0, 100)
    assert coefficient.value == before


def test_the_adaptive_coefficient_finds_its_target() -> None:
    coefficient = kl.AdaptiveKL(0.01, target=2.0, horizon=200.0)
    for _ in range(800):
        coefficient.update(1 / coefficient.value, 20)  # a policy whose KL is the reciprocal of its price
    assert coefficient.value == pytest.approx(0.5, rel=1e-3)


def test_the_fixed_coefficient_stays() -> None:
    coefficient = kl.FixedKL(0.2)
    coefficient.update(100.0, 10)
    assert coefficient.value == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": 0.2, "target": 0.0}, "`kl_target` must be a finite number > 0, got 0.0."),
        ({"value": 0.2, "horizon": math.inf}, "`kl_horizon` must be a finite number > 0, got inf."),
        ({"value": 0.0}, "`kl_coef` must be > 0 for an adaptive coefficient, got 0.0."),
    ],
)
def test_bad_coefficients_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        kl.AdaptiveKL(**arguments)
