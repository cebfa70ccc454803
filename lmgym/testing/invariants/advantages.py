"""Invariants of rewards and advantages."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lmgym.testing.adapter import GAEInputs, GroupInputs, RewardInputs, TrainerAdapter
from lmgym.testing.invariants.base import ROUNDING, Gaps, invariant, largest_gap

LENGTHS = (5, 2, 4, 1)
GAMMA = 0.9
LAMBDA = 0.8
SCORES = (0.1, 0.3, 0.7, 1.1, 2.3)  # whose means over a group are not exact in float32


def mask_of(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """(B, T) bool of responses with these lengths."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float32, the same for every trainer."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- rewards ---------------------------------------------------------------------------------------------------------


def reward_inputs(kl_coef: float) -> RewardInputs:
    """Four responses whose scores are large beside their log-probs."""
    mask = mask_of()
    log_probs = torch.where(mask, -random(4, 5).abs(), 0.0)
    reference = torch.where(mask, -random(4, 5, seed=1).abs(), 0.0)
    return RewardInputs(torch.tensor([10.0, -20.0, 30.0, 40.0]), log_probs, reference, mask, kl_coef)


@invariant("score-at-last-token", "token_rewards", tolerance=1e-4, reason=ROUNDING)
def score_at_last_token(trainer: TrainerAdapter) -> Gaps:
    """The score is paid with the last token of the response, not on the padding after it, and once."""
    assert trainer.token_rewards is not None
    inputs = reward_inputs(0.0)
    found = trainer.token_rewards(inputs)
    last = inputs.mask.sum(-1) - 1
    expected = torch.zeros(inputs.mask.shape)
    expected[torch.arange(4), last] = inputs.scores
    yield "reward of a token", largest_gap(found, expected)


@invariant("kl-in-reward", "token_rewards", tolerance=1e-4, reason=ROUNDING)
def kl_in_reward(trainer: TrainerAdapter) -> Gaps:
    """The rewards of a response add up to its score less kl_coef times log pi / pi_ref, over its tokens alone."""
    assert trainer.token_rewards is not None
    if not trainer.has_kl:
        raise NotImplementedError("the trainer has no KL term")
    inputs = reward_inputs(0.3)
    paid = (trainer.token_rewards(inputs) * inputs.mask).sum(-1)
    if not bool((paid - inputs.scores).abs().max() > 0):
        raise NotImplementedError("the trainer's KL is not in the reward")
    expected = inputs.scores - 0.3 * ((inputs.log_probs - inputs.ref_log_probs) * inputs.mask).sum(-1)
    yield "return of a response", largest_gap(paid, expected)


# -- a critic --------------------------------------------------------------------------------------------------------


def gae_inputs() -> GAEInputs:
    """Four responses that end; padding holds numbers that are not 0."""
    values = random(4, 5, seed=1).requires_grad_()
    next_values = random(4, seed=2).requires_grad_()
    nobody = torch.zeros(4, dtype=torch.bool)
    rewards = torch.where(mask_of(), random(4, 5), 0.0)
    return GAEInputs(rewards, values, mask_of(), GAMMA, LAMBDA, nobody, next_values)


def slow_gae(inputs: GAEInputs) -> Tensor:
    """(B, T) by the definition: sums of the TD errors that follow (Schulman et al. 2016, eq. 16)."""
    found = torch.zeros(inputs.mask.shape)
    for row, length in enumerate(inputs.mask.sum(-1).tolist()):
        values = inputs.values[row, :length].tolist()
        values.append(inputs.next_values[row].item() if inputs.truncated[row] else 0.0)
        for t in range(length):
            for k in range(t, length):
                error = inputs.rewards[row, k].item() + inputs.gamma * values[k + 1] - values[k]
                found[row, t] += (inputs.gamma * inputs.gae_lambda) ** (k - t) * error
    return found


@invariant("gae", "gae", tolerance=1e-4, reason=ROUNDING)
def gae(trainer: TrainerAdapter) -> Gaps:
    """Advantages are sums of the TD errors that follow, each discounted by gamma and lambda."""
    assert trainer.gae is not None
    inputs = gae_inputs()
    yield "advantage of a token", largest_gap(trainer.gae(inputs), slow_gae(inputs), inputs.mask)


@invariant("gae-not-through-padding", "gae", tolerance=1e-4, reason=ROUNDING)
def gae_not_through_padding(trainer: TrainerAdapter) -> Gaps:
    """Values on padding, whatever they are, change no advantage of a token."""
    assert trainer.gae is not None
    inputs = gae_inputs()
    other = replace(inputs, values=torch.where(inputs.mask, inputs.values, 100.0))
    yield "change of an advantage", largest_gap(trainer.gae(other), trainer.gae(inputs), inputs.mask)


@invariant("truncation", "gae", tolerance=1e-4, reason=ROUNDING)
def truncation(trainer: TrainerAdapter) -> Gaps:
    """A response that a length limit cuts off goes on with V of its last state; one that has ended does not."""
    assert trainer.gae is not None
    inputs = replace(gae_inputs(), truncated=torch.tensor([True, False, True, False]))
    yield "advantage of a token", largest_gap(trainer.gae(inputs), slow_gae(inputs), inputs.mask)


@invariant("advantages-constant", tolerance=0, reason="a constant has no gradient")
def advantages_constant(trainer: TrainerAdapter) -> Gaps:
    """Advantages carry no gradient, to the critic or to the policy."""
    if trainer.gae is None and trainer.group_advantages is None:
        raise NotImplementedError("needs `gae` or `group_advantages`")
    if trainer.gae is not None:
        yield "gradient through `gae`", float(trainer.gae(gae_inputs()).requires_grad)
    if trainer.group_advantages is not None:
        inputs = group_inputs((0.3, 0.1, 0.9, 0.2), 2)
        inputs = replace(inputs, log_probs=inputs.log_probs.requires_grad_())
        yield "gradient through `group_advantages`", float(trainer.group_advantages(inputs).requires_grad)


@invariant("whitening", "whiten", tolerance=1e-3, reason="the small number that is added to a deviation")
def whitening(trainer: TrainerAdapter) -> Gaps:
    """Whitening is over the mask alone: mean 0 and standard deviation 1 there, whatever stands on padding."""
    assert trainer.whiten is not None
    lengths = (16, 3, 9, 1)
    mask = mask_of(lengths)
    numbers = 3 * random(*mask.shape) + 5
    found = trainer.whiten(torch.where(mask, numbers, 100.0), mask)[mask]
    count = len(found)
    deviations = [found.std(correction=correction).item() for correction in (0, 1)]
    yield "mean", abs(found.mean().item())
    yield f"standard deviation less 1, over {count} or {count - 1}", min(abs(x - 1) for x in deviations)


# -- groups ----------------------------------------------------------------------------------------------------------


def group_inputs(scores: tuple[float, ...] | Tensor, group_size: int) -> GroupInputs:
    """Responses with these scores and no KL."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    mask = torch.arange(3) < (torch.arange(len(scores)) % 3 + 1).unsqueeze(1)
    log_probs = -torch.ones(mask.shape)
    return GroupInputs(scores, log_probs, log_probs.clone(), mask, 0.0, group_size=group_size)


def group_advantages(trainer: TrainerAdapter, inputs: GroupInputs) -> Tensor:
    """(B,) the advantages of responses, of their first tokens where each token has one."""
    assert trainer.group_advantages is not None
    found = trainer.group_advantages(inputs).detach()
    return found[:, 0] if found.dim() == 2 else found


@invariant("group-axis", "group_advantages", tolerance=1e-3, reason="rounding, by a small standard deviation")
def group_axis(trainer: TrainerAdapter) -> Gaps:
    """A response is compared with the others to its own prompt: a harder prompt changes nothing."""
    scores = torch.tensor([0.3, 0.1, 0.9, 0.2, 0.5, 0.8])
    before = group_advantages(trainer, group_inputs(scores, 3))
    for prompt in range(2):
        harder = scores.clone()
        harder[3 * prompt : 3 * prompt + 3] -= 5
        after = group_advantages(trainer, group_inputs(harder, 3))
        yield f"change of an advantage, prompt {prompt} harder", largest_gap(after, before)
    in_order = before.view(2, 3).argsort(1).eq(scores.view(2, 3).argsort(1)).all().item()
    yield "advantages that are not in the order of the scores", float(not in_order)


@invariant("equal-scores", "group_advantages", tolerance=1e-2, reason="rounding of a mean over epsilon = 1e-4")
def equal_scores(trainer: TrainerAdapter) -> Gaps:
    """A group of equal scores has advantages of 0: neither nan nor noise of rounding blown up to 1."""
    for size in (2, 3, 5, 6, 7):
        scores = torch.tensor(SCORES).repeat_interleave(size)
        yield (
            f"advantage in a group of {size}",
            group_advantages(trainer, group_inputs(scores, size)).abs().max().item(),
        )


# -- log-probs that are not those of the sampling --------------------------------------------------------------------


@invariant("stale-detected", "detect_stale", tolerance=0, reason="it is said or it is not")
def stale_detected(trainer: TrainerAdapter) -> Gaps:
    """Log-probs that are not those of the sampling are detected at the first step, and rounding is not."""
    mask = mask_of()
    old = -random(4, 5).abs() - 0.5
    yield (
        "stale log-probs that nobody noticed",
        float(not _is_noticed(trainer, old + 0.3 * random(4, 5, seed=1), old, mask)),
    )
    yield "alarms about rounding", float(_is_noticed(trainer, old + 1e-6 * random(4, 5, seed=1), old, mask))
    on_padding = torch.where(mask, old, old + 3)
    yield "alarms about padding", float(_is_noticed(trainer, on_padding, old, mask))


def _is_noticed(trainer: TrainerAdapter, new: Tensor, old: Tensor, mask: Tensor) -> bool:
    assert trainer.detect_stale is not None
    try:
        return bool(trainer.detect_stale(new, old, mask))
    except NotImplementedError:
        raise
    except Exception:  # whatever a trainer calls its own error
        return True


INVARIANTS = (
    score_at_last_token,
    kl_in_reward,
    gae,
    gae_not_through_padding,
    truncation,
    advantages_constant,
    whitening,
    group_axis,
    equal_scores,
    stale_detected,
)
