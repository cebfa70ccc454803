"""Which ways of handling the KL give the gradient of J, and which do not: expectations as sums over all responses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.gradients import (
    Facts,
    at_distance,
    directions,
    estimates,
    exact_gradient,
    facts,
    make_task,
    reference_table,
    surrogates,
    table_logits,
)
from lmgym.optimum.tree import Tree

UNBIASED = {"k1 in the reward", "k2 in the loss, whole response"}
BIASED = {
    "k1 in the loss",
    "k2 in the loss, a token",
    "k3 in the loss, a token",
    "exact KL in the loss, a state",
}
SAMPLES = 4000


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.of(make_task())


@pytest.fixture(scope="module")
def table(tree: Tree) -> Tensor:
    return at_distance(tree, directions(tree, 1, seed=0)[0], 1.0)


@pytest.fixture(scope="module")
def at_table(tree: Tree, table: Tensor) -> Facts:
    return facts(tree, table)


@pytest.fixture(scope="module")
def gradient(tree: Tree, table: Tensor) -> Tensor:
    return exact_gradient(tree, table)


def test_the_reference_is_at_distance_0_and_the_policy_where_it_was_put(tree: Tree, table: Tensor) -> None:
    assert tree.evaluate(partial(table_logits, reference_table(tree.task))).kl.item() == pytest.approx(0, abs=1e-6)
    assert tree.evaluate(partial(table_logits, table)).kl.item() == pytest.approx(1, abs=1e-6)


def test_the_responses_have_probability_1(at_table: Facts) -> None:
    assert len(at_table.probs) == 1 + 3 + 9 + 27 + 81 * 4
    assert at_table.probs.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_exact_gradient_is_the_slope_of_j(tree: Tree, table: Tensor, gradient: Tensor) -> None:
    step = 1e-5 * gradient.view_as(table) / gradient.norm()
    ahead, back = (tree.evaluate(partial(table_logits, x)).value for x in (table + step, table - step))
    assert (ahead - back) / 2e-5 == pytest.approx(gradient.norm().item(), rel=1e-6)


@pytest.mark.parametrize("baseline", [False, True])
def test_which_are_unbiased_and_which_are_not(at_table: Facts, gradient: Tensor, baseline: bool) -> None:
    found = estimates(at_table, baseline=baseline)
    assert found.keys() == UNBIASED | BIASED
    for name, estimate in found.items():
        error = (at_table.probs @ estimate - gradient).abs().max().item()
        assert error < 1e-8 if name in UNBIASED else error > 0.05 * gradient.abs().max().item(), (name, error)


def test_a_baseline_changes_no_expectation(at_table: Facts) -> None:
    plain = estimates(at_table)
    based = estimates(at_table, baseline=True)
    for name, estimate in plain.items():
        assert torch.allclose(at_table.probs @ estimate, at_table.probs @ based[name], atol=1e-12)
        assert not torch.allclose(estimate, based[name])


def test_the_value_is_the_mean_of_the_responses_that_share_a_prefix(tree: Tree, at_table: Facts) -> None:
    scores = at_table.scores.unsqueeze(1).expand_as(at_table.log_ratio) * at_table.mask
    value = at_table.value(scores)
    ids = tree.episodes.response_ids
    for row, column in ((300, 0), (300, 2), (300, 4), (0, 0)):
        same = (ids[:, :column] == ids[row, :column]).all(1) & at_table.mask[:, column]
        mean = at_table.probs[same] @ at_table.scores[same] / at_table.probs[same].sum()
        assert value[row, column].item() == pytest.approx(mean.item())
    assert value[0, 1:].abs().sum() == 0  # after the end


def test_k1_in_the_loss_does_nothing_about_the_kl(at_table: Facts) -> None:
    by_score = (at_table.scores.view(-1, 1, 1) * at_table.score_function).sum(1)
    assert torch.allclose(at_table.probs @ estimates(at_table)["k1 in the loss"], at_table.probs @ by_score, atol=1e-12)


def test_k2_a_token_has_the_expectation_of_the_exact_kl_of_the_states(at_table: Facts) -> None:
    found = estimates(at_table)
    a_token = found["k2 in the loss, a token"]
    a_state = found["exact KL in the loss, a state"]
    assert torch.allclose(at_table.probs @ a_token, at_table.probs @ a_state, atol=1e-12)


def test_k3_a_token_has_the_gradient_of_the_other_kl_at_the_states(tree: Tree, table: Tensor, at_table: Facts) -> None:
    """KL(pi_ref || pi) at the states that pi visits, by autograd, with their distribution held."""
    parameter = table.clone().requires_grad_()
    own = table_logits(parameter, tree.episodes).log_softmax(-1)
    ref = table_logits(reference_table(tree.task), tree.episodes).log_softmax(-1)
    weights = at_table.probs.unsqueeze(1).expand_as(at_table.mask)[at_table.mask]
    other = (weights * (ref.exp() * (ref - own)).sum(-1)).sum()
    (expected,) = torch.autograd.grad(other, parameter)
    weight = -torch.expm1(-at_table.log_ratio).unsqueeze(-1)
    k3_part = at_table.probs @ (weight * at_table.score_function).sum(1)
    assert torch.allclose(k3_part, expected.flatten(), atol=1e-6)  # the reference's own table is float32


def test_what_k2_a_token_leaves_out_is_the_kl_of_later_states(at_table: Facts, gradient: Tensor) -> None:
    """Its bias is E sum_t grad log pi(a_t|s_t) * (KL that follows): credited, it is gone."""
    later = at_table.log_ratio.flip(1).cumsum(1).flip(1) - at_table.log_ratio
    missing = -at_table.kl_coef * (later.unsqueeze(-1) * at_table.score_function).sum(1)
    complete = estimates(at_table)["k2 in the loss, a token"] + missing
    assert torch.allclose(at_table.probs @ complete, gradient, atol=1e-8)


def test_sampled_means_agree(tree: Tree, table: Tensor, at_table: Facts) -> None:
    """Episodes drawn token by token, and losses as a training loop writes them."""
    lengths = tree.episodes.lengths.tolist()
    rows = {
        tuple(ids[:n]): i for i, (ids, n) in enumerate(zip(tree.episodes.response_ids.tolist(), lengths, strict=True))
    }
    generator = torch.Generator().manual_seed(0)
    probs = table.softmax(-1)
    drawn = []
    for _ in range(SAMPLES):
        response = []
        last = int(tree.episodes.prompt_ids[0, -1])
        while not response or (last and len(response) < len(table)):
            last = int(torch.multinomial(probs[len(response), last], 1, generator=generator))
            response.append(last)
        drawn.append(rows[tuple(response)])
    parameter = table.clone().requires_grad_()
    losses = surrogates(parameter, tree, tree.episodes[drawn])
    found = estimates(at_table)
    assert losses.keys() == found.keys()
    for name, loss in losses.items():
        (total,) = torch.autograd.grad(-loss, parameter, retain_graph=True)
        mean = at_table.probs @ found[name]
        error = (at_table.probs @ (found[name] - mean).square() / SAMPLES).sqrt()
        assert ((total.flatten() / SAMPLES - mean).abs() <= 4 * error + 1e-12).all(), name
        assert ((total.flatten() / SAMPLES + mean).abs() > 4 * error + 1e-12).any(), f"{name}: too few to tell a sign"
