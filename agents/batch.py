"""What a loss gets: a batch of whole episodes, and the flat minibatch that the policy reads from a part of it.

Shapes: B episodes, T response columns, n chosen tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from agents.policies.actor_critic import TrainablePolicy
from lmgym.episodes import Episodes
from lmgym.models.categorical import log_probs_and_entropies
from lmgym.models.causal import token_log_probs
from lmgym.models.sampling import Sampler

_CPU_EPISODES = 32  # in a forward with gradients on a CPU: more at once is slower, by the memory that it touches


@dataclass(frozen=True)
class Batch:
    """Episodes to learn from.

    Attributes:
        episodes: B, on the policy's device; their `values` are given.
        advantages: (B, T).
        returns: (B, T) the critic's targets.
        progress: share of the run before the batch.
        sampler_log_probs: (B, T) those that the tokens were sampled with, where the episodes have recomputed ones; or
            None.
        importance: (B, T) what the advantages of tokens are multiplied by when they are read; None is 1.
    """

    episodes: Episodes
    advantages: Tensor
    returns: Tensor
    progress: float = 0.0
    sampler_log_probs: Tensor | None = None
    importance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        """The batch of some rows, (b,) int64 or a slice."""
        return replace(
            self,
            episodes=self.episodes[rows],
            advantages=self.advantages[rows],
            returns=self.returns[rows],
            sampler_log_probs=None if self.sampler_log_probs is None else self.sampler_log_probs[rows],
            importance=None if self.importance is None else self.importance[rows],
        )

    def sort_by_length(self) -> Batch:
        """The same episodes, short ones first: parts of them have little padding."""
        return self[self.episodes.lengths.argsort()]

    def split(self, size: int) -> Iterator[Batch]:
        """Yields parts of at most `size` episodes, in their order."""
        for rows in _chunks(self.episodes, size):
            yield self if size >= len(self) else self[rows]

    def split_for_gradients(self, size: int) -> Iterator[Batch]:
        """The same for gradients that are added up; on a CPU of no more than stay in its cache."""
        return self.split(size if self.advantages.is_cuda else min(size, _CPU_EPISODES))


@dataclass(frozen=True)
class Minibatch:
    """Chosen tokens of some episodes, flat. All are (n,), but `logits`, `log_distribution` and `ref_logits` (n, V).

    Attributes:
        logits: of the distributions that tokens are drawn from, by the policy being updated; has a gradient.
        log_probs: of the chosen tokens, by the same; has a gradient.
        entropies: of the same distributions, in nats; has a gradient.
        old_log_probs: those that the tokens were sampled with.
        values: of the policy being updated; has a gradient.
        old_values: before the update.
        advantages: of the tokens.
        returns: the critic's targets.
        weights: sum to 1 over the micro-batches of a minibatch: a sum with them is the mean over tokens.
        episode_weights: 1 / (episodes of the minibatch): a sum with them is the mean over episodes of a sum over
            tokens, and with them divided by `lengths` the mean over episodes of a mean over tokens.
        lengths: tokens of the response that a token is of.
        positions: of the tokens in their responses, from 0.
        ref_log_probs: of the chosen tokens under the reference.
        ref_logits: of the reference; None where no loss asks for them.
    """

    logits: Tensor
    log_probs: Tensor
    entropies: Tensor
    old_log_probs: Tensor
    values: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    episode_weights: Tensor
    lengths: Tensor
    positions: Tensor
    ref_log_probs: Tensor
    ref_logits: Tensor | None = None

    @cached_property
    def log_distribution(self) -> Tensor:
        """(n, V) log-probs of every token, differentiable twice; made where a loss asks for it."""
        return self.logits.float().log_softmax(-1)


def read_minibatch(policy: TrainablePolicy, sampler: Sampler, part: Batch, total: Tensor, count: int) -> Minibatch:
    """Has the policy read a part of a minibatch, in one forward.

    Args:
        policy: what is updated.
        sampler: how the tokens were drawn, given the policy's logits.
        part: the episodes of a micro-batch.
        total: () tokens of the whole minibatch. count: episodes of the whole minibatch.
    """
    episodes = part.episodes
    assert episodes.values is not None
    chosen = episodes.response_mask.nonzero(as_tuple=True)
    row, positions = chosen
    read = policy.read(episodes)
    logits = sampler.adjust_rows(read.logits, positions)
    log_probs, entropies = log_probs_and_entropies(logits, episodes.response_ids[chosen])
    advantages = part.advantages[chosen]
    if part.importance is not None:  # a positive weight on the policy's loss, whatever it does with advantages
        advantages = advantages * part.importance[chosen]
    return Minibatch(
        logits=logits,
        log_probs=log_probs,
        entropies=entropies,
        old_log_probs=episodes.log_probs[chosen],
        values=read.values,
        old_values=episodes.values[chosen],
        advantages=advantages,
        returns=part.returns[chosen],
        weights=torch.full_like(read.values, 1.0) / total,
        episode_weights=torch.full_like(read.values, 1.0 / count),
        lengths=episodes.lengths[row],
        positions=positions,
        ref_log_probs=episodes.ref_log_probs[chosen],
    )


def with_values(policy: TrainablePolicy, episodes: Episodes, size: int) -> Episodes:
    """Episodes with the values of the policy's critic, read `size` episodes at a time."""
    parts = [policy.values(episodes[rows]) for rows in _chunks(episodes, size)]
    return replace(episodes, values=torch.cat(parts))


class Recomputed(NamedTuple):
    """Episodes with new log-probs and values; `is_possible` (B, T) is False for tokens that a truncation leaves out."""

    episodes: Episodes
    is_possible: Tensor


@torch.no_grad()
def recompute(policy: TrainablePolicy, sampler: Sampler, episodes: Episodes, size: int) -> Recomputed:
    """Episodes with the log-probs and values of a new forward, `size` episodes at a time, not those of the sampling.

    A token that is off the support of a truncated distribution, by rounding or because something else has sampled it,
    keeps the log-prob that it was drawn with.
    """
    is_possible = torch.ones_like(episodes.response_mask)
    values = torch.zeros_like(episodes.log_probs)
    log_probs = episodes.log_probs.clone()
    for rows in _chunks(episodes, size):
        few = episodes[rows]
        mask = few.response_mask
        read = policy.read(few)
        logits = sampler.adjust_rows(read.logits, mask.nonzero()[:, 1])
        found = token_log_probs(logits, few.response_ids[mask])
        is_gone = found == -torch.inf
        is_possible[rows] = is_possible[rows].masked_scatter(mask, ~is_gone)
        new_log_probs = few.log_probs.clone()
        new_log_probs[mask] = torch.where(is_gone, new_log_probs[mask], found)
        log_probs[rows] = new_log_probs
        new_values = torch.zeros_like(new_log_probs)
        new_values[mask] = read.values
        values[rows] = new_values
    return Recomputed(replace(episodes, values=values, log_probs=log_probs), is_possible)


def _chunks(episodes: Episodes, size: int) -> Iterator[slice]:
    """Rows of episodes, `size` at a time, in their order."""
    for start in range(0, len(episodes), size):
        yield slice(start, start + size)


def clip_scores(episodes: Episodes, limit: float | None) -> Episodes:
    """Episodes whose scores are clipped to +- `limit`; None does not clip."""
    return episodes if limit is None else replace(episodes, scores=episodes.scores.clamp(-limit, limit))
