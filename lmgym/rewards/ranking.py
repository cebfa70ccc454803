"""Losses of a reward model that learns from judgements of several completions of a prompt. Pure functions of scores.

Shapes: B prompts with K completions each (K may differ from prompt to prompt), N completions in all, M pairs of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from lmgym.errors import InvalidArgumentError

MAX_TIED = 10  # completions in one tie under Plackett-Luce, whose exact average is over 2 ** tied subsets

Tiers = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Comparisons:
    """Pairs of completions that were compared, of several prompts.

    Attributes:
        better: (M,) int64, which of the N completions was preferred. worse: (M,) int64, to which.
        tied: (M,) bool, True where neither was preferred; which of the two is called the better one means nothing.
        strength: (M,) float, how much better, in the units of the judgement; 0 where it does not say.
        prompt: (M,) int64, of which of the B prompts.
        num_prompts: B; each has a pair at least.
    """

    better: Tensor
    worse: Tensor
    tied: Tensor
    strength: Tensor
    prompt: Tensor
    num_prompts: int

    def to(self, device: torch.device | str) -> Comparisons:
        """The same on a device."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "num_prompts"}
        return Comparisons(**{name: x.to(device) for name, x in tensors.items()}, num_prompts=self.num_prompts)

    @classmethod
    def of_rankings(cls, rankings: Sequence[Tiers], sizes: Sequence[int]) -> Comparisons:
        """Every pair of completions that rankings compare.

        Args:
            rankings: a prompt each: indices of its completions in groups, the best group first. Those of a group are
                tied; those in no group are unranked, and in no pair.
            sizes: K of each prompt.

        Raises:
            InvalidArgumentError: for a ranking of fewer than two completions.
        """
        rows: list[tuple[int, int, bool, int]] = []
        start = 0
        for prompt, (tiers, size) in enumerate(zip(rankings, sizes, strict=True)):
            pairs = list(_pairs_of(tiers))
            if not pairs:
                raise InvalidArgumentError(f"`rankings` must rank two completions at least, got {tiers!r}.")
            rows += [(start + better, start + worse, tied, prompt) for better, worse, tied in pairs]
            start += size
        better, worse, tied, prompts = (torch.tensor(column) for column in zip(*rows, strict=True))
        return cls(better, worse, tied, torch.zeros(len(rows)), prompts, len(rankings))


def _pairs_of(tiers: Tiers) -> list[tuple[int, int, bool]]:
    """(better, worse, tied) of every pair of ranked completions: first those of the best completion."""
    order = [(index, position) for position, group in enumerate(tiers) for index in group]
    return [(first, second, above == below) for (first, above), (second, below) in itertools.combinations(order, 2)]


# -- pairs -----------------------------------------------------------------------------------------------------------


def kwise_loss(
    scores: Tensor, comparisons: Comparisons, margin: float = 0.0, tie_log_odds: Tensor | None = None
) -> Tensor:
    """The mean over prompts of the mean over the pairs of each (Ouyang et al. 2022, equation 1).

    All pairs of a prompt are of one forward, and a prompt counts once however many completions it has. For K = 2 it is
    `pairwise_loss`.

    Args:
        scores: (N,) rewards. comparisons: of them. margin, tie_log_odds: as for `pair_losses`.

    Returns:
        Scalar, nats a pair; log 2 where all scores are equal and nothing is tied.
    """
    losses = pair_losses(scores, comparisons, margin, tie_log_odds)
    return mean_over_prompts(losses, comparisons.prompt, comparisons.num_prompts).mean()


def pairwise_loss(
    scores: Tensor, comparisons: Comparisons, margin: float = 0.0, tie_log_odds: Tensor | None = None
) -> Tensor:
    """The mean over all pairs alike, so that a prompt with K completions counts K (K - 1) / 2 times.

    Args:
        scores: (N,) rewards. comparisons: of them. margin, tie_log_odds: as for `pair_losses`.

    Returns:
        Scalar, nats a pair.
    """
    return pair_losses(scores, comparisons, margin, tie_log_odds).mean()


def pair_losses(
    scores: Tensor, comparisons: Comparisons, margin: float = 0.0, tie_log_odds: Tensor | None = None
) -> Tensor:
    """-log of the probability of what was said of each pair.

    Of a preference that is sigmoid(r_better - r_worse - margin * strength) (Bradley & Terry 1952; the margin: Touvron
    et al. 2023, Llama 2). A tie is half a preference for the one and half for the other. With `tie_log_odds`, ties
    have a probability of their own (Davidson 1970): with d = r_better - r_worse,

        P(preferred) = e^(d / 2) / (e^(d / 2) + e^(-d / 2) + nu),    P(tie) = nu / (the same).

    Args:
        scores: (N,) rewards.
        comparisons: of them.
        margin: units of the score that a unit of strength is worth at least; 0 leaves it out.
        tie_log_odds: scalar, log nu, which may be learned.

    Returns:
        (M,) nats.

    Raises:
        InvalidArgumentError: for scores that are no vector.
    """
    gaps = score_gaps(scores, comparisons)
    if margin:
        gaps = gaps - margin * comparisons.strength.to(gaps.dtype)
    if tie_log_odds is None:
        losses = -F.logsigmoid(gaps)
        return torch.where(comparisons.tied, (losses - F.logsigmoid(-gaps)) / 2, losses)
    log_odds = tie_log_odds.to(gaps.dtype).expand_as(gaps)
    total = torch.stack([gaps / 2, -gaps / 2, log_odds]).logsumexp(0)
    return total - torch.where(comparisons.tied, log_odds, gaps / 2)


def score_gaps(scores: Tensor, comparisons: Comparisons) -> Tensor:
    """(M,) r_better - r_worse of (N,) scores.

    Raises:
        InvalidArgumentError: for scores that are no vector.
    """
    if scores.ndim != 1:
        raise InvalidArgumentError(f"`scores` must have shape (N,), got {tuple(scores.shape)}.")
    return scores[comparisons.better] - scores[comparisons.worse]


def mean_over_prompts(numbers: Tensor, prompt: Tensor, num_prompts: int) -> Tensor:
    """(B,) means of (M,) numbers, each of the prompt (M,) that it belongs to; NaN for a prompt that has none."""
    counts = torch.bincount(prompt, minlength=num_prompts)
    return numbers.new_zeros(num_prompts).index_add(0, prompt, numbers) / counts


def pair_accuracy(scores: Tensor, comparisons: Comparisons) -> Tensor:
    """(M,) 1 where the scores order a pair as it was judged, 0 where the other way round, 0.5 where they are equal.

    Of a tie it is NaN: there is nothing to be right about.
    """
    right = (score_gaps(scores.detach(), comparisons).double().sign() + 1) / 2
    return right.masked_fill(comparisons.tied, math.nan)


def ranking_accuracy(scores: Tensor, ranking: Tensor) -> float:
    """Share of the pairs that the scores order as rankings without ties do; a tie of scores counts one half.

    Args:
        scores: (B, K) rewards.
        ranking: (B, K) int64, indices best first.

    Returns:
        A number in [0, 1]; chance is 0.5.

    Raises:
        InvalidArgumentError: If the shapes differ, or K < 2.
    """
    if scores.ndim != 2 or scores.shape != ranking.shape or scores.shape[1] < 2:
        raise InvalidArgumentError(
            "`scores` and `ranking` must both have shape (B, K) with K >= 2, "
            f"got {tuple(scores.shape)} and {tuple(ranking.shape)}."
        )
    best_first = scores.gather(1, ranking)
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    margins = best_first[:, better] - best_first[:, worse]
    return float((margins.sign() + 1).mean() / 2)


# -- whole rankings --------------------------------------------------------------------------------------------------


def plackett_luce_loss(scores: Tensor, rankings: Sequence[Tiers], sizes: Sequence[int]) -> Tensor:
    """-log of the probability of rankings when the best is chosen first, then the best of the rest, and so on.

    Each choice among the completions that are left has probability softmax(scores) (Luce 1959, Plackett 1975). Of tied
    completions every order counts alike: the loss is the mean over all the orders that the ties allow. Completions
    that were not ranked are left out. It is divided by the number of choices, ranked completions less one, and averaged
    over prompts, so that for K = 2 it is `pairwise_loss`.

    Args:
        scores: (N,) rewards.
        rankings: of each prompt, as for `Comparisons.of_rankings`.
        sizes: K of each prompt.

    Returns:
        Scalar, nats a choice.

    Raises:
        InvalidArgumentError: where more than `MAX_TIED` completions are tied.
    """
    losses = []
    for own, tiers in zip(scores.split(list(sizes)), rankings, strict=True):
        losses.append(_loss_of_ranking(own, tiers))
    return torch.stack(losses).mean()


def _loss_of_ranking(scores: Tensor, tiers: Tiers) -> Tensor:
    """Nats a choice of one ranking; scores (K,)."""
    count = sum(map(len, tiers))
    if count == len(tiers):  # without ties
        order = scores[[index for group in tiers for index in group]]
        rest = order.flip(0).logcumsumexp(0).flip(0)
        return (rest - order)[:-1].sum() / (count - 1)
    total = scores.new_zeros(())
    below = scores.new_full((1,), -math.inf)
    for group in reversed(tiers):
        own = scores[list(group)]
        total = total + _mean_over_orders(own, below) - own.sum()
        below = torch.cat([own, below]).logsumexp(0, keepdim=True)
    return total / (count - 1)


def _mean_over_orders(scores: Tensor, below: Tensor) -> Tensor:
    """The sum of log(sum of e^score of those left) over the choices among t tied completions, on average over orders.

    After t - n choices in random order, every subset of n tied completions is left with the same probability.

    Args:
        scores: (t,) of those that are tied. below: (1,) logsumexp of all that are worse; -inf where there are none.
    """
    tied = len(scores)
    if tied > MAX_TIED:
        raise InvalidArgumentError(
            f"`rankings` must have at most {MAX_TIED} completions in a tie under Plackett-Luce, got {tied}: take "
            "another objective."
        )
    subsets = [left for n in range(1, tied + 1) for left in itertools.combinations(range(tied), n)]
    weights = scores.new_tensor([1 / math.comb(tied, len(left)) for left in subsets])
    sums = [torch.cat([scores[list(left)], below]).logsumexp(0) for left in subsets]
    return (weights * torch.stack(sums)).sum()


# -- ratings ---------------------------------------------------------------------------------------------------------


def regression_loss(scores: Tensor, targets: Tensor, prompt: Tensor, num_prompts: int) -> Tensor:
    """The mean over prompts of the mean squared difference between scores and ratings.

    Args:
        scores: (N,) rewards.
        targets: (N,) ratings, NaN where a completion was not rated.
        prompt: (N,) int64, of which of the B prompts.
        num_prompts: B; each has a rating at least.

    Returns:
        Scalar, in the square of the targets' unit.
    """
    rated = ~targets.isnan()
    errors = (scores[rated] - targets[rated].to(scores.dtype)).square()
    return mean_over_prompts(errors, prompt[rated], num_prompts).mean()
