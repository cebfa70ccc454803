"""What the policies of S seeds say of their own episodes, from one forward of all of them.

Episodes lie seed by seed: of S * b rows, those of seed s are s * b to (s + 1) * b - 1. Seeds have unequal numbers of
tokens. A shorter list of tokens goes on with copies of its last one, which have weight 0: no sum feels them.

Shapes: S seeds, b episodes a seed, L columns, T response columns, n tokens of the seed that has most, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.batch import Batch, Minibatch
from agents.policies.actor_critic import read_logits
from agents.policies.stacked import StackedPolicy
from lmgym.episodes import Episodes
from lmgym.models.categorical import exact_kl, log_probs_and_entropies
from lmgym.models.causal import CausalLM
from lmgym.models.padding import pack
from lmgym.models.sampling import Sampler


@dataclass(frozen=True)
class Tokens:
    """Where the chosen tokens of S * b episodes are.

    Attributes:
        ids: (S, b, L) sequences from column 0. columns: (S, n) row * L + column that predicts each token.
        chosen: (S, n) int64, the tokens. positions: (S, n) int64, theirs in their responses.
        index: (S, n) int64, the number of each among all chosen tokens. is_one: (S, n) bool, False on copies.
    """

    ids: Tensor
    columns: Tensor
    chosen: Tensor
    positions: Tensor
    index: Tensor
    is_one: Tensor


def find_tokens(episodes: Episodes, seeds: int) -> Tokens:
    """The chosen tokens of S * b episodes."""
    mask = episodes.response_mask
    ids, rows, columns, chosen = pack(episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, mask)
    ids = ids.unflatten(0, (seeds, -1))
    counts = episodes.lengths.view(seeds, -1).sum(1)
    starts = counts.cumsum(0) - counts
    numbers = torch.arange(int(counts.max()), device=counts.device)
    index = starts[:, None] + torch.minimum(numbers, counts[:, None] - 1)
    within = (rows % ids.shape[1]) * ids.shape[2] + columns
    positions = mask.nonzero()[:, 1]
    return Tokens(ids, within[index], chosen[index], positions[index], index, numbers < counts[:, None])


def read_side_by_side(policy: StackedPolicy, sampler: Sampler, part: Batch, totals: Tensor, count: int) -> Minibatch:
    """Has each seed's policy read its part of a minibatch (`agents.batch.read_minibatch`), in one forward.

    Args:
        policy: what is updated. sampler: how the tokens were drawn.
        part: S * b episodes.
        totals: (S,) tokens of the seeds' whole minibatches. count: episodes of the whole minibatch of a seed.

    Returns:
        A minibatch whose tensors are (S, n), and (S, n, V).
    """
    episodes = part.episodes
    assert episodes.values is not None
    tokens = find_tokens(episodes, len(policy))
    read = policy.read_at(tokens.ids, tokens.columns)
    logits = sampler.adjust_rows(read.logits.flatten(0, 1), tokens.positions.flatten())
    log_probs, entropies = log_probs_and_entropies(logits, tokens.chosen.flatten())
    flat = episodes.response_mask.nonzero(as_tuple=True)
    chosen = tuple(x[tokens.index] for x in flat)
    weights = tokens.is_one.to(read.values.dtype)
    return Minibatch(
        logits=logits.view(read.logits.shape),
        log_probs=log_probs.view(read.values.shape),
        entropies=entropies.view(read.values.shape),
        old_log_probs=episodes.log_probs[chosen],
        values=read.values,
        old_values=episodes.values[chosen],
        advantages=part.advantages[chosen],
        returns=part.returns[chosen],
        weights=weights / totals[:, None],
        episode_weights=weights / count,
        lengths=episodes.lengths[chosen[0]],
        positions=tokens.positions,
        ref_log_probs=episodes.ref_log_probs[chosen],
    )


@torch.no_grad()
def exact_kls(policy: StackedPolicy, sampler: Sampler, reference: CausalLM, episodes: Episodes) -> list[float]:
    """Of each seed `agents.diagnostics.exact_kl` of its b episodes."""
    seeds = len(policy)
    tokens = find_tokens(episodes, seeds)
    logits = policy.read_at(tokens.ids, tokens.columns).logits.flatten(0, 1)
    adjusted = sampler.adjust_rows(logits, tokens.positions.flatten())
    kls = exact_kl(adjusted, read_logits(reference, episodes)[tokens.index.flatten()])
    return ((kls.view(seeds, -1) * tokens.is_one).sum(1) * seeds / len(episodes)).tolist()
