"""How well scores order what people have compared: accuracy, calibration, accuracy against the margin.

Shapes: E examples with N completions in all, M pairs of them, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.intervals import Interval, is_rare
from lmgym.reward_models.examples import Batch, Example
from lmgym.rewards.ranking import mean_over_prompts, pair_accuracy, score_gaps

BINS = 10
MIN_IN_BIN = 20  # pairs


@dataclass(frozen=True)
class Bin:
    """Pairs of like margins.

    Attributes:
        centre: mean of what they are alike in. share: that the scores order as they were judged, with its interval.
        pairs: how many they are.
    """

    centre: float
    share: Interval
    pairs: int


@dataclass(frozen=True)
class Measures:
    """What scores are worth on pairs that they were not fitted to.

    Attributes:
        accuracy: mean over prompts of the share of pairs that are ordered as they were judged; ties are left out.
        prompts, pairs, ties: how many there were.
        calibration: by predicted probability of the better-scored completion, sigmoid(margin).
        calibration_error: mean distance of predicted and observed share, over pairs.
        by_margin: by the difference of the two scores.
        by_strength: by how much better people found the better one; empty where they were not asked.
    """

    accuracy: Interval
    prompts: int
    pairs: int
    ties: int
    calibration: tuple[Bin, ...]
    calibration_error: float
    by_margin: tuple[Bin, ...]
    by_strength: tuple[Bin, ...]


def measure(scores: Tensor, examples: Sequence[Example]) -> Measures | None:
    """The measures of (N,) scores of the completions of examples; None where no pair has a preferred one."""
    compared = [example for example in examples if example.tiers]
    if not compared:
        return None
    pairs = _pairs(scores, examples)
    untied = ~pairs.tied
    if not bool(untied.any()):
        return None
    right = pairs.right[untied]
    margins = pairs.gaps[untied].abs()
    prompts = pairs.prompt[untied]
    predicted = margins.sigmoid()
    calibration = _bins(predicted, right, prompts)
    total = sum(part.pairs for part in calibration)
    error = sum(part.pairs * abs(part.share.mean - part.centre) for part in calibration) / total
    strengths = pairs.strengths[untied]
    asked = strengths > 0
    accuracy = accuracy_of_prompts(scores, examples)
    return Measures(
        share_interval(accuracy),
        len(accuracy),
        len(right),
        int(pairs.tied.sum()),
        calibration,
        error,
        _bins(margins, right, prompts),
        _bins(strengths[asked], right[asked], prompts[asked]),
    )


def accuracy_of_prompts(scores: Tensor, examples: Sequence[Example]) -> Tensor:
    """(P,) float64: the share of each prompt's pairs that (N,) scores order as they were judged.

    Ties are left out, and a prompt that has nothing else. Several judgements of one prompt are taken together, so that
    the numbers are independent.
    """
    if not any(example.tiers for example in examples):
        return torch.empty(0, dtype=torch.float64)
    pairs = _pairs(scores, examples)
    untied = ~pairs.tied
    accuracy = mean_over_prompts(pairs.right[untied], pairs.prompt[untied], pairs.num_prompts)
    return accuracy[~accuracy.isnan()]


@dataclass(frozen=True)
class _Pairs:
    """(M,) each: r_better - r_worse; 1 where that is right; ties; strengths; and which of the prompts."""

    gaps: Tensor
    right: Tensor
    tied: Tensor
    strengths: Tensor
    prompt: Tensor
    num_prompts: int


def _pairs(scores: Tensor, examples: Sequence[Example]) -> _Pairs:
    kept = []
    parts = scores.detach().cpu().double().split([len(example.sequences) for example in examples])
    for example, part in zip(examples, parts, strict=True):
        if example.tiers:
            kept.append((example, part))
    compared = [example for example, _ in kept]
    own = torch.cat([part for _, part in kept])
    comparisons = Batch(compared).comparisons()
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(example.prompt for example in compared))}
    prompt_of = torch.tensor([numbers[example.prompt] for example in compared])
    gaps = score_gaps(own, comparisons)
    prompt = prompt_of[comparisons.prompt]
    return _Pairs(gaps, pair_accuracy(own, comparisons), comparisons.tied, comparisons.strength, prompt, len(numbers))


def _bins(numbers: Tensor, right: Tensor, prompt: Tensor) -> tuple[Bin, ...]:
    """Pairs in bins of like numbers, as many in each but for equal numbers, which are never in two bins."""
    if not len(numbers):
        return ()
    count = max(1, min(BINS, len(numbers) // MIN_IN_BIN))
    ends = torch.quantile(numbers, torch.linspace(0, 1, count + 1, dtype=numbers.dtype)[1:-1]).unique()
    bin_of = torch.bucketize(numbers, ends)
    found = []
    for part in bin_of.unique().tolist():
        inside = bin_of == part
        _, own = prompt[inside].unique(return_inverse=True)
        per_prompt = mean_over_prompts(right[inside], own, int(own.max()) + 1)
        share = share_interval(per_prompt)
        found.append(Bin(float(numbers[inside].mean()), share, int(inside.sum())))
    return tuple(found)


def share_interval(shares: Tensor) -> Interval:
    """Interval of the mean of (n,) independent shares: Student's, or `Interval.bounded` where few of them differ."""
    if is_rare(shares, known=True):
        return Interval.bounded(shares, 0.0, 1.0)
    student = Interval.of(shares)
    return Interval(student.mean, max(0.0, student.low), min(1.0, student.high))


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two (N,) tensors; NaN where one of them does not vary."""
    both = torch.stack([first.double(), second.double()])
    return float(torch.corrcoef(both)[0, 1]) if len(first) > 1 else math.nan
