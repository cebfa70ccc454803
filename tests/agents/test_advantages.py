"""Advantage estimators against their definitions: sums written out, closed forms, and formulas that must be refused."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from agents.advantages import (
    _gae_at_once,
    batch_standardised,
    gae,
    group_baseline,
    group_leave_one_out,
    group_standardised,
    leave_one_out,
    mixed_groups,
    returns_to_go,
    segment_advantages,
    soft_overlong_penalty,
    whiten,
)

GAMMA = 0.9
LAMBDA = 0.8


def ragged(lengths: list[int], columns: int) -> Tensor:
    """(B, T) bool: a prefix of each row."""
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)


def problem(lengths: list[int], columns: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask of float64 episodes; what lies off the mask is not zero, and must not matter."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn((2, len(lengths), columns), generator=generator, dtype=torch.float64)
    return rewards, values, ragged(lengths, columns)


def slow_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float, bootstrap: Tensor | None
) -> Tensor:
    """Equation 16 as it is written: A_t = sum_l (gamma lambda)^l delta_{t+l}, each episode by itself."""
    advantages = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        n = int(mask[i].sum())
        after = 0.0 if bootstrap is None else bootstrap[i].item()
        v = [*values[i, :n].tolist(), after]
        deltas = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantages[i, t] = sum((gamma * gae_lambda) ** (s - t) * deltas[s] for s in range(t, n))
    return advantages


def monte_carlo(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_s gamma^(s - t) r_s to the end of the episode."""
    result = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        n = int(mask[i].sum())
        for t in range(n):
            result[i, t] = sum(gamma ** (s - t) * rewards[i, s].item() for s in range(t, n))
    return result


@pytest.mark.parametrize("gamma", [1.0, GAMMA, 0.0])
@pytest.mark.parametrize("gae_lambda", [1.0, LAMBDA, 0.0])
@pytest.mark.parametrize("truncated", [False, True])
def test_gae_is_the_discounted_sum_of_deltas(gamma: float, gae_lambda: float, truncated: bool) -> None:
    rewards, values, mask = problem([6, 1, 4, 3])
    bootstrap = torch.tensor([0.0, 1.5, -2.0, 0.7], dtype=torch.float64) if truncated else None
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda, bootstrap)
    expected = slow_gae(rewards, values, mask, gamma, gae_lambda, bootstrap)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, (expected + values) * mask, rtol=0, atol=1e-12)
    at_once = _gae_at_once(rewards, values, mask, gamma, gae_lambda, bootstrap)  # what a GPU runs
    for x, y in zip(at_once, (advantages, returns), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_lambda_one_is_monte_carlo_less_the_value() -> None:
    rewards, values, mask = problem([6, 2, 5])
    advantages, returns = gae(rewards, values, mask, GAMMA, 1.0)
    expected = monte_carlo(rewards, mask, GAMMA)
    torch.testing.assert_close(advantages, (expected - values) * mask, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-12)


def test_lambda_zero_is_one_step_td() -> None:
    rewards, values, mask = problem([6, 2, 5])
    advantages, returns = gae(rewards, values, mask, GAMMA, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    following = following * torch.cat([mask[:, 1:], torch.zeros(3, 1, dtype=torch.bool)], dim=1)  # no future at the end
    torch.testing.assert_close(returns, (rewards + GAMMA * following) * mask, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages, returns - values * mask, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_a_segment_s_advantage_is_its_rewards_and_the_value_after_less_that_before(size: int) -> None:
    rewards, values, mask = problem([6, 2, 5, 1])
    found = segment_advantages(rewards, torch.where(mask, values, 7.0), mask, GAMMA, size)
    for i, n in enumerate(mask.sum(1).tolist()):
        for t in range(mask.shape[1]):
            start = t - t % size
            end = min(start + size, n)
            expected = sum(GAMMA ** (k - start) * rewards[i, k].item() for k in range(start, end))
            expected += 0.0 if end == n else GAMMA**size * values[i, end].item()
            expected = expected - values[i, start].item() if t < n else 0.0
            assert found[i, t].item() == pytest.approx(expected)
    if size == 1:
        torch.testing.assert_close(found, gae(rewards, values, mask, GAMMA, 0.0)[0])


def test_the_advantages_of_a_perfect_critic_of_a_deterministic_chain_are_zero() -> None:
    rewards, _, mask = problem([6, 2, 5])
    values = monte_carlo(rewards, mask, GAMMA)
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages, returns = gae(rewards, values, mask, GAMMA, gae_lambda)
        torch.testing.assert_close(advantages, torch.zeros_like(rewards), rtol=0, atol=1e-12)
        torch.testing.assert_close(returns, values, rtol=0, atol=1e-12)


def test_nothing_off_the_mask_matters_and_nothing_is_written_there() -> None:
    rewards, values, mask = problem([3, 5])
    noisy = [torch.where(mask, x, 1e6) for x in (rewards, values)]
    for result, same in zip(gae(rewards, values, mask, GAMMA, LAMBDA), gae(*noisy, mask, GAMMA, LAMBDA), strict=True):
        assert torch.equal(result, same)
        assert (result[~mask] == 0).all()


def test_a_row_does_not_feel_its_batch_mates_or_its_padding() -> None:
    rewards, values, mask = problem([3, 6, 1])
    bootstrap = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    together = gae(rewards, values, mask, GAMMA, LAMBDA, bootstrap)
    for i, n in enumerate(mask.sum(-1).tolist()):
        row = (slice(i, i + 1), slice(0, n))
        alone = gae(rewards[row], values[row], mask[row], GAMMA, LAMBDA, bootstrap[i : i + 1])
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row], part, rtol=0, atol=1e-12)


def test_arguments_are_not_changed() -> None:
    rewards, values, mask = problem([3, 6])
    bootstrap = torch.ones(2, dtype=torch.float64)
    kept = [x.clone() for x in (rewards, values, mask, bootstrap)]
    gae(rewards, values, mask, GAMMA, LAMBDA, bootstrap)
    for before, after in zip(kept, (rewards, values, mask, bootstrap), strict=True):
        assert torch.equal(before, after)


# -- truncation is not termination -----------------------------------------------------------------------------------


def chain_value(bootstraps: bool, *, sweeps: int = 400, columns: int = 4, reward: float = 2.0) -> Tensor:
    """V of a chain that pays `reward` for ever, cut every `columns` steps: V <- mean of the returns, many times."""
    rewards = torch.full((1, columns), reward, dtype=torch.float64)
    mask = torch.ones((1, columns), dtype=torch.bool)
    value = torch.zeros(1, dtype=torch.float64)
    for _ in range(sweeps):
        values = value.expand(1, columns)
        _, returns = gae(rewards, values, mask, GAMMA, LAMBDA, value if bootstraps else None)
        value = returns.mean(-1)
    return value


def test_bootstrapping_recovers_the_value_of_a_truncated_infinite_chain() -> None:
    endless = torch.tensor([2.0 / (1 - GAMMA)], dtype=torch.float64)
    torch.testing.assert_close(chain_value(bootstraps=True), endless, rtol=1e-9, atol=0)


def test_a_truncated_chain_taken_for_a_terminated_one_is_far_off() -> None:
    # Four paid steps are all that a terminated episode can be worth.
    most = 2.0 * (1 - GAMMA**4) / (1 - GAMMA)
    assert chain_value(bootstraps=False).item() <= most < 0.4 * 2.0 / (1 - GAMMA)


def test_the_bootstrap_reaches_back_with_gamma_and_lambda() -> None:
    mask = ragged([3, 2], 4)
    zeros = torch.zeros((2, 4), dtype=torch.float64)
    advantages, _ = gae(zeros, zeros, mask, GAMMA, LAMBDA, torch.tensor([1.0, 0.0], dtype=torch.float64))
    expected = torch.tensor([GAMMA * (GAMMA * LAMBDA) ** k for k in (2, 1, 0)], dtype=torch.float64)
    torch.testing.assert_close(advantages[0, :3], expected, rtol=0, atol=1e-12)
    assert (advantages[1] == 0).all()  # a row of 0 is one that terminated


def without_lambda(r: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return slow_gae(r, v, m, GAMMA, 1.0, None)


def discounted_by_lambda_alone(r: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return slow_gae(r, v, m, 1.0, LAMBDA, None)


def with_the_value_of_the_padding_after(r: Tensor, v: Tensor, m: Tensor) -> Tensor:
    next_values = torch.cat([v, torch.zeros_like(v[:, :1])], dim=1).gather(1, m.sum(-1, keepdim=True)).squeeze(1)
    return slow_gae(r, v, m, GAMMA, LAMBDA, next_values)


@pytest.mark.parametrize(
    "wrong",
    [without_lambda, discounted_by_lambda_alone, with_the_value_of_the_padding_after],
    ids=lambda f: f.__name__,
)
def test_a_wrong_formula_is_told_from_gae(wrong: object) -> None:
    rewards, values, mask = problem([6, 3, 4])
    advantages, _ = gae(rewards, values, mask, GAMMA, LAMBDA)
    assert (wrong(rewards, values, mask) - advantages).abs().max() > 0.1  # type: ignore[operator]


# -- whitening -------------------------------------------------------------------------------------------------------


def test_whitening_makes_mean_zero_and_standard_deviation_one_over_the_mask() -> None:
    x, _, mask = problem([6, 1, 4])
    whitened = whiten(3 * x + 5, mask)
    kept = whitened[mask]
    assert kept.mean().abs() < 1e-12
    assert (kept.square().mean() - 1).abs() < 1e-6
    assert (whitened[~mask] == 0).all()
    # An affine map and no more: what lay above still does, in proportion.
    slope = (kept[1:] - kept[:-1]) / (x[mask][1:] - x[mask][:-1])
    torch.testing.assert_close(slope, slope[0].expand_as(slope))
    assert slope[0] > 0


def test_whitening_ignores_what_lies_off_the_mask() -> None:
    x, _, mask = problem([6, 1, 4])
    assert torch.equal(whiten(x, mask), whiten(torch.where(mask, x, 1e9), mask))
    everywhere = (x - x.mean()) / x.var(unbiased=False).sqrt()
    assert (whiten(x, mask) - everywhere)[mask].abs().max() > 0.05  # what a mean over the padding would give


def test_whitening_without_a_shift_keeps_the_mean() -> None:
    x, _, mask = problem([6, 1, 4])
    x = 3 * x + 5
    whitened = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(whitened[mask].mean(), x[mask].mean())
    torch.testing.assert_close(
        whitened[mask].var(unbiased=False), torch.ones((), dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert (whitened[~mask] == 0).all()


def test_whitening_a_constant_or_a_single_token_gives_zero_and_not_nan() -> None:
    mask = ragged([3, 1], 4)
    assert torch.equal(whiten(torch.full((2, 4), 7.0), mask), torch.zeros(2, 4))
    assert torch.equal(whiten(torch.full((1, 4), 7.0), ragged([1], 4)), torch.zeros(1, 4))


# -- returns and baselines without a critic --------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, GAMMA, 0.0])
def test_returns_to_go_are_sums_to_the_end_of_the_episode(gamma: float) -> None:
    rewards, _, mask = problem([6, 1, 4, 3])
    returns = returns_to_go(rewards, mask, gamma)
    torch.testing.assert_close(returns, monte_carlo(rewards, mask, gamma), rtol=0, atol=1e-12)
    assert torch.equal(returns, returns_to_go(torch.where(mask, rewards, 1e6), mask, gamma))
    assert (returns[~mask] == 0).all()


def slow_leave_one_out(returns: Tensor, mask: Tensor) -> Tensor:
    """For each entry the mean over the other rows that have one at its place."""
    result = torch.zeros_like(returns)
    for i, t in mask.nonzero().tolist():
        others = [returns[j, t].item() for j in range(len(returns)) if j != i and mask[j, t]]
        result[i, t] = statistics.fmean(others) if others else 0.0
    return result


@pytest.mark.parametrize("lengths", [[6, 1, 4, 3], [5, 5], [2], [1, 1, 1], [6, 2, 2]])
def test_a_baseline_is_the_mean_of_the_other_episodes_at_the_same_position(lengths: list[int]) -> None:
    returns, _, mask = problem(lengths)
    baseline = leave_one_out(returns, mask)
    torch.testing.assert_close(baseline, slow_leave_one_out(returns, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(leave_one_out(torch.where(mask, returns, 1e3), mask), baseline, rtol=0, atol=1e-10)


def test_where_one_episode_alone_is_alive_its_baseline_is_0() -> None:
    returns, _, mask = problem([6, 2, 3])
    assert (leave_one_out(returns, mask)[0, 3:] == 0).all()
    assert (leave_one_out(returns, mask)[0, :3] != 0).all()


def test_a_baseline_does_not_move_with_the_episodes_own_return() -> None:
    returns, _, mask = problem([6, 4, 5])
    changed = returns.clone()
    changed[1] += 10.0
    torch.testing.assert_close(leave_one_out(changed, mask)[1], leave_one_out(returns, mask)[1], rtol=0, atol=1e-12)
    assert (leave_one_out(changed, mask)[0, :4] - leave_one_out(returns, mask)[0, :4]).abs().min() > 1


def groups_of(size: int, groups: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return 2 + 3 * torch.randn(size * groups, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_group_is_judged_by_its_others(size: int) -> None:
    returns = groups_of(size)
    expected = []
    for i, own in enumerate(returns.tolist()):
        start = i - i % size
        expected.append(own - statistics.fmean(returns[j].item() for j in range(start, start + size) if j != i))
    found = group_leave_one_out(returns, size)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.view(-1, size).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("scale", [True, False])
def test_a_group_is_centred_and_standardised(size: int, scale: bool) -> None:
    returns = groups_of(size)
    expected = []
    for group in returns.view(-1, size).tolist():
        over = statistics.stdev(group) + 1e-4 if scale else 1.0
        expected += [(x - statistics.fmean(group)) / over for x in group]
    assert group_standardised(returns, size, scale=scale).tolist() == pytest.approx(expected, abs=1e-12)


def test_neighbouring_groups_do_not_feel_each_other() -> None:
    returns = groups_of(4)
    changed = torch.cat([returns[:4], returns[4:] * 100])
    for function in (group_leave_one_out, group_standardised):
        assert torch.equal(function(changed, 4)[:4], function(returns, 4)[:4])


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_a_group_of_equal_returns_gets_0(value: float) -> None:
    equal = torch.cat([torch.full((4,), value), torch.tensor([1.0, 2.0, 3.0, 4.0])])
    for found in (
        group_leave_one_out(equal, 4),
        group_standardised(equal, 4),
        group_standardised(equal, 4, scale=False),
    ):
        assert found[:4].abs().max() < 1e-2 * found[4:].abs().max()
        assert found.isfinite().all()


def test_the_deviation_of_a_batch_is_that_of_all_differences_in_groups() -> None:
    returns = groups_of(4)
    centred = [x - statistics.fmean(group) for group in returns.view(-1, 4).tolist() for x in group]
    over = statistics.fmean([x * x for x in centred]) ** 0.5
    assert batch_standardised(returns, 4).tolist() == pytest.approx([x / (over + 1e-4) for x in centred])
    assert not batch_standardised(torch.full((8,), 0.3), 4).any()


def test_the_group_baseline_is_the_mean_of_whole_returns() -> None:
    rewards, _, mask = problem([1, 4, 6, 2])
    returns = monte_carlo(rewards, mask, 1.0)
    found = group_baseline(returns, returns[:, 0], 2)
    for i in range(4):
        first = i - i % 2
        mean = (returns[first, 0].item() + returns[first + 1, 0].item()) / 2
        assert found[i].tolist() == pytest.approx([x - mean for x in returns[i].tolist()])


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0), (12, -1.0)]
)
def test_the_overlong_penalty_falls_linearly_over_the_last_tokens(length: int, penalty: float) -> None:
    assert soft_overlong_penalty(torch.tensor([length]), 10, 4).item() == pytest.approx(penalty)


def test_a_group_is_mixed_where_one_score_differs() -> None:
    scores = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.3, 0.3, 0.3])
    assert mixed_groups(scores, 3).tolist() == [True, True, False]
    assert not mixed_groups(scores, 1).any()
