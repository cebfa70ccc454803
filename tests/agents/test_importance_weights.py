"""Importance weights by enumeration: what a mismatched sampler's expected update is, with and without them.

Shapes: R responses of two tokens each, V tokens.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from agents.algorithms.klq import KLQConfig
from agents.algorithms.ppo import PPOConfig
from agents.batch import Batch
from agents.importance import measure_sampler, weigh
from agents.losses import clipped_policy_loss, masked_importance, policy_gradient_loss, truncated_importance
from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.models.sampling import Sampler

V = 3
RESPONSES = torch.tensor(list(itertools.product(range(V), repeat=2)))  # (R, 2)
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 2.0, 0.3, -0.7], dtype=torch.float64)
SAMPLER = Sampler(temperature=1.6)


def table() -> Tensor:
    """(1 + V, V) logits: of the first token, and of the second after each first one."""
    logits = torch.randn((1 + V, V), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return logits.requires_grad_()


def token_log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(R, 2) of every response's tokens."""
    log_probs = (logits / temperature).log_softmax(-1)
    states = torch.stack([torch.zeros(len(RESPONSES), dtype=torch.int64), 1 + RESPONSES[:, 0]], dim=1)
    return log_probs[states, RESPONSES]


def exact_gradient(logits: Tensor) -> Tensor:
    """Of J = E_pi score, by autograd of the sum over all responses."""
    value = (token_log_probs(logits).sum(1).exp() * SCORES).sum()
    return torch.autograd.grad(value, logits)[0]


def batch_of(trainer: Tensor, sampled: Tensor) -> Batch:
    """All responses once, with the trainer's log-probs and the sampler's."""
    count = len(RESPONSES)
    mask = torch.ones((count, 2), dtype=torch.bool)
    episodes = Episodes(
        prompt_ids=torch.zeros((count, 1), dtype=torch.int64),
        prompt_mask=mask[:, :1],
        response_ids=RESPONSES,
        response_mask=mask,
        log_probs=trainer.detach(),
        ref_log_probs=torch.zeros_like(sampled),
        scores=SCORES,
        values=None,
        terminated=mask[:, 0],
        prompt_index=torch.zeros(count, dtype=torch.int64),
    )
    advantages = SCORES.unsqueeze(1).expand(count, 2)
    return Batch(episodes, advantages, advantages, sampler_log_probs=sampled.detach())


def expected_update(logits: Tensor, **config: object) -> Tensor:
    """Up the gradient of the loss that batches of the sampler have on average, before any step."""
    trainer = token_log_probs(logits)
    sampled = token_log_probs(logits, SAMPLER.temperature)
    batch = batch_of(trainer, sampled)
    weights = weigh(batch, PPOConfig(recompute_log_probs=True, **config)) if config else torch.ones_like(trainer)
    probs = sampled.detach().sum(1, keepdim=True).exp().expand_as(trainer)
    advantages = (batch.advantages * weights).flatten()
    loss = policy_gradient_loss(trainer.flatten(), advantages, probs.flatten())
    clipped = clipped_policy_loss(trainer.flatten(), trainer.detach().flatten(), advantages, probs.flatten(), 0.2).loss
    update = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(clipped, logits)[0], update)  # PPO's begins as REINFORCE's
    return -update


def test_weights_are_those_of_a_slow_twin() -> None:
    ratios = [0.1, 0.5, 0.9, 1.0, 1.7, 2.0, 5.0, 40.0]
    log_ratio = torch.tensor([math.log(x) for x in ratios], dtype=torch.float64)
    truncated = truncated_importance(log_ratio, 2.0)
    masked = masked_importance(log_ratio, 0.5 - 1e-9, 2.0 + 1e-9)
    for i, ratio in enumerate(ratios):
        assert truncated[i].item() == pytest.approx(min(ratio, 2.0))
        assert masked[i].item() == pytest.approx(ratio if 0.5 <= ratio <= 2.0 else 0.0)


def test_weights_have_no_gradient() -> None:
    log_ratio = torch.zeros(3, requires_grad=True)
    assert not truncated_importance(log_ratio, 2.0).requires_grad
    assert not masked_importance(log_ratio, 0.5, 2.0).requires_grad


def test_whole_weights_of_responses_give_the_exact_gradient() -> None:
    logits = table()
    exact = exact_gradient(logits)
    whole = expected_update(logits, importance="truncated", importance_level="response", importance_high=1e9)
    torch.testing.assert_close(whole, exact)
    assert (expected_update(logits) - exact).norm() > 0.1 * exact.norm()  # without weights it is of another objective
    tokens = expected_update(logits, importance="truncated", importance_high=1e9)
    assert (tokens - exact).norm() > 0.01 * exact.norm()  # of the state distribution, which they leave to the sampler


def test_weights_of_tokens_are_exact_for_what_the_last_token_adds() -> None:
    """Given its state a token's weight is exact: what is left is how often the sampler visits the state."""
    logits = table()
    tokens = expected_update(logits, importance="truncated", importance_high=1e9)
    probs = token_log_probs(logits).detach().exp()[::V, 0]
    sampled = token_log_probs(logits, SAMPLER.temperature).detach().exp()[::V, 0]
    torch.testing.assert_close(tokens[1:] / sampled.unsqueeze(1), exact_gradient(logits)[1:] / probs.unsqueeze(1))


@pytest.mark.parametrize("level", ["token", "response"])
@pytest.mark.parametrize(
    ("config", "share_lost"),
    [
        ({"importance": "truncated", "importance_high": 1.1}, lambda ratio: (1 - 1.1 / ratio).clamp(min=0)),
        (
            {"importance": "masked", "importance_low": 0.8, "importance_high": 1.1},
            lambda ratio: ((ratio < 0.8) | (ratio > 1.1)).double(),
        ),
    ],
    ids=["truncated", "masked"],
)
def test_the_bias_of_a_cap_is_what_the_formula_says(config: dict[str, object], share_lost: object, level: str) -> None:
    """- E_trainer[share lost * A * grad log pi], where the level says over what the trainer's expectation is."""
    logits = table()
    whole = expected_update(logits, importance="truncated", importance_level=level, importance_high=1e9)
    found = expected_update(logits, importance_level=level, **config)
    trainer = token_log_probs(logits)
    sampled = token_log_probs(logits, SAMPLER.temperature).detach()
    own = trainer.detach()
    log_ratio = own - sampled
    log_mass = sampled.sum(1, keepdim=True) + log_ratio  # the trainer's token in the sampler's state, or all of it
    if level == "response":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(own)
        log_mass = own.sum(1, keepdim=True).expand_as(own)
    lost = share_lost(log_ratio.exp())  # type: ignore[operator]
    bias = torch.autograd.grad((log_mass.exp() * lost * SCORES.unsqueeze(1) * trainer).sum(), logits)[0]
    torch.testing.assert_close(found, whole - bias)
    assert bias.norm() > 0.01


def test_a_response_that_the_trainer_cannot_give_weighs_nothing() -> None:
    """The trainer never begins with the last token, and the sampler does."""
    logits = table()
    gone = torch.zeros((1 + V, V), dtype=torch.bool)
    gone[0, -1] = True
    trainer = token_log_probs(logits.masked_fill(gone, -torch.inf))
    sampled = token_log_probs(logits, SAMPLER.temperature).detach()
    is_possible = trainer.detach() > -torch.inf
    begins = is_possible[:, :1].expand_as(trainer)
    batch = batch_of(torch.where(is_possible, trainer, sampled), sampled)
    config = PPOConfig(
        recompute_log_probs=True, importance="truncated", importance_level="response", importance_high=1e9
    )

    def update(weights: Tensor) -> Tensor:
        probs = sampled.sum(1, keepdim=True).exp().expand_as(trainer)
        loss = policy_gradient_loss(trainer.flatten(), (batch.advantages * weights).flatten(), probs.flatten())
        return -torch.autograd.grad(loss, logits, retain_graph=True)[0]

    weights = weigh(batch, config, is_possible)
    assert (weights[~begins] == 0).all()
    value = (trainer.sum(1).exp() * SCORES).sum()
    exact = torch.autograd.grad(value, logits, retain_graph=True)[0]
    torch.testing.assert_close(update(weights), exact)
    assert (update(weigh(batch, config)) - exact).norm() > 0.01 * exact.norm()


def test_metrics_say_how_far_the_sampler_is() -> None:
    logits = table()
    trainer = token_log_probs(logits).detach()
    sampled = token_log_probs(logits, SAMPLER.temperature).detach()
    batch = batch_of(trainer, sampled)
    metrics = measure_sampler(batch)
    ratios = (trainer - sampled).exp()
    assert metrics == {
        "train/sampler_gap": pytest.approx((trainer - sampled).abs().mean().item()),
        "train/sampler_gap_max": pytest.approx((trainer - sampled).abs().max().item()),
        "train/sampler_kl": pytest.approx((ratios - 1 - ratios.log()).mean().item(), rel=1e-4),
    }


def test_a_correction_needs_the_log_probs_of_both() -> None:
    with pytest.raises(InvalidArgumentError, match=r"`recompute_log_probs` must be true where `importance` is"):
        PPOConfig(importance="truncated")
    with pytest.raises(InvalidArgumentError, match=r"`importance` must be 'none' for a loss without advantages"):
        KLQConfig(importance="masked", recompute_log_probs=True)
