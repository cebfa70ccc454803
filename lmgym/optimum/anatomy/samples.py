"""The gap of any policy from episodes that it has sampled, where pi* is known token by token.

Each state that an episode comes through adds the exact kl_coef KL(pi(.|s) || pi*(.|s)), so that only the visits are
noisy.

Shapes: X prompts, R episodes of each, B = X R episodes, T steps, n chosen tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError
from lmgym.intervals import Interval
from lmgym.kl import entropy, exact
from lmgym.models.causal import CausalLM
from lmgym.models.policy import Policy
from lmgym.models.sampling import Sampler
from lmgym.optimum.anatomy.automaton import last_tokens
from lmgym.optimum.anatomy.best import find_best
from lmgym.optimum.anatomy.parts import (
    LEAST_SHARE,
    MOST_STATES,
    GapAnatomy,
    Masses,
    StateGap,
    TokenOdds,
    check_additive,
    compare_tokens,
    divide,
)
from lmgym.optimum.answer import Optimum
from lmgym.optimum.automaton import AutomatonPolicy
from lmgym.optimum.exact import make_sampled_logits
from lmgym.optimum.tree import make_episode_logits
from lmgym.tasks.base import Task

_ENTRIES_AT_ONCE = 1 << 24  # log-probs of two policies
_ODDS_OF = 64  # visits of a state that its distributions are the mean of
_SAME_SCORE = 1e-5  # as a share: scores of episodes are float32


@dataclass(frozen=True, eq=False)
class EpisodeGaps:
    """What each token of some episodes adds to the gap.

    Attributes:
        shares: (B, T) kl_coef gamma^t KL(pi(.|s_t) || pi*(.|s_t)), in units of the score; 0 off the mask.
        kl, entropy, optimal_entropy: (B, T) nats; 0 off the mask.
        log_probs, optimal_log_probs: (B, T) nats, of the chosen tokens under the policy and under pi*.
    """

    shares: Tensor
    kl: Tensor
    entropy: Tensor
    optimal_entropy: Tensor
    log_probs: Tensor
    optimal_log_probs: Tensor


@torch.no_grad()
def gaps_of_episodes(
    episodes: Episodes, policy: Policy, optimal: Policy, task: Task, sampler: Sampler | None = None
) -> EpisodeGaps:
    """Compares a policy with pi* at every state of its episodes.

    Args:
        episodes: B, sampled by the policy, on the CPU. policy: what sampled them. optimal: pi*.
        task: whose price and discount count. sampler: how tokens were drawn, given the policy's logits.

    Raises:
        InvalidArgumentError: where the gap is no sum over states.
    """
    check_additive(task)
    mask = episodes.response_mask
    columns = torch.zeros((5, *mask.shape), dtype=torch.float64)
    logits = [make_sampled_logits(policy, sampler or Sampler(), mask.shape[1]), make_episode_logits(optimal)]
    size = max(_ENTRIES_AT_ONCE // (mask.shape[1] * task.reference("cpu").vocab_size), 1)
    for start in range(0, len(episodes), size):
        few = episodes[start : start + size]
        chosen = few.response_mask
        own, best = (read(few).cpu().double().log_softmax(-1) for read in logits)
        tokens = few.response_ids[chosen].unsqueeze(1)
        found = [exact(own, best), entropy(own), entropy(best), *(x.gather(1, tokens).squeeze(1) for x in (own, best))]
        for column, numbers in zip(columns, found, strict=True):
            column[start : start + len(few)][chosen] = numbers
    discounts = task.gamma ** torch.arange(mask.shape[1], dtype=torch.float64)
    return EpisodeGaps(task.kl_coef * discounts * columns[0], *columns)


@torch.no_grad()
def dissect_episodes(
    episodes: Episodes,
    policy: Policy,
    optimum: Optimum,
    task: Task,
    *,
    sampler: Sampler | None = None,
    most: int = MOST_STATES,
) -> GapAnatomy:
    """Takes the gap of a policy apart from its episodes, with 95 % intervals over the sampling.

    Args:
        episodes: R of each of the X prompts that V* is of, prompt by prompt, sampled by the policy, on the CPU.
        policy: what sampled them. optimum: V* and pi*. task: whose price and discount count.
        sampler: how tokens were drawn, given the policy's logits. most: how many states to list.

    Raises:
        InvalidArgumentError: where pi* is not known, and where the gap is no sum over states.
    """
    optimal = optimum.policy
    if optimal is None:
        raise InvalidArgumentError("`optimum` must have a policy, and pi* is not known here: V* is within bounds.")
    prompts = len(optimum.values)
    if len(episodes) % prompts or not _are_sorted(episodes, prompts):
        raise InvalidArgumentError(
            f"`episodes` must be of the {prompts} prompts of the optimum, as many of each, got {len(episodes)}."
        )
    found = gaps_of_episodes(episodes, policy, optimal, task, sampler)
    lm = task.reference("cpu")
    sampled = _Sampled(episodes, prompts, policy, optimal, lm, sampler or Sampler(), found)
    shares = found.shares.view(prompts, -1, found.shares.shape[1])
    gap = Interval.over_repeats(shares.sum(2))
    running = episodes.response_mask.double().sum(0)
    return GapAnatomy(
        method="samples",
        optimum=optimum.value,
        value=optimum.value - gap.mean,
        gap=gap,
        by_step=[Interval.over_repeats(share) for share in shares.unbind(2)],
        by_prompt=shares.mean(1).tolist(),
        running=(running / len(episodes)).tolist(),
        entropy=divide(found.entropy.sum(0), running),
        optimal_entropy=divide(found.optimal_entropy.sum(0), running),
        states=_list_states(sampled, most),
        masses=_weigh(sampled, task, optimum),
    )


def _are_sorted(episodes: Episodes, prompts: int) -> bool:
    """Whether episodes of one prompt lie next to each other, as many of each of X prompts."""
    each = episodes.prompt_index.view(prompts, -1)
    return bool((each == each[:, :1]).all()) and len(each[:, 0].unique()) == prompts


@dataclass(frozen=True, eq=False)
class _Sampled:
    """Episodes of X prompts, what sampled them, and what it is compared with."""

    episodes: Episodes
    prompts: int
    policy: Policy
    optimal: Policy
    lm: CausalLM
    sampler: Sampler
    gaps: EpisodeGaps


def _list_states(sampled: _Sampled, most: int) -> list[StateGap]:
    """The states with the largest shares among those that were visited."""
    visits: dict[Hashable, list[tuple[int, int]]] = {}
    sums: dict[Hashable, float] = {}
    shares = sampled.gaps.shares.tolist()
    for (b, t), key in _keys_of(sampled.episodes, sampled.optimal).items():
        visits.setdefault(key, []).append((b, t))
        sums[key] = sums.get(key, 0.0) + shares[b][t]
    largest = sorted(sums, key=lambda key: -sums[key])[:most]
    return [_describe(sampled, key, visits[key]) for key in largest if sums[key] >= LEAST_SHARE * len(shares)]


def _describe(sampled: _Sampled, key: Hashable, visits: list[tuple[int, int]]) -> StateGap:
    """A state, as `_keys_of` names it, of its visits as row and step."""
    episodes = sampled.episodes
    rows = torch.tensor([row for row, _ in visits])
    t = visits[0][1]
    by_episode = torch.zeros(len(episodes), dtype=torch.float64)
    by_episode[rows] = sampled.gaps.shares[rows, t]
    too_likely, too_unlikely = _compare_mean_tokens(sampled, rows[:_ODDS_OF], t)
    first = episodes[rows[:1]]
    ids = first.prompt_ids[first.prompt_mask].tolist()
    text = sampled.lm.completions([ids], [first.response_ids[0, :t].tolist()])[0]
    automaton_state = None
    if isinstance(sampled.optimal, AutomatonPolicy) and isinstance(key, tuple):
        text = last_tokens(sampled.lm, sampled.optimal.reference, key[2], t)
        automaton_state = key[3]
    return StateGap(
        prompt=sampled.lm.decode_prompt(ids) if len(episodes.prompt_index[rows].unique()) == 1 else None,
        response=text,
        step=t,
        automaton_state=automaton_state,
        visits=len(rows) / len(episodes),
        kl=sampled.gaps.kl[rows, t].mean().item(),
        share=Interval.over_repeats(by_episode.view(sampled.prompts, -1)),
        too_likely=too_likely,
        too_unlikely=too_unlikely,
    )


def _keys_of(episodes: Episodes, optimal: Policy) -> dict[tuple[int, int], Hashable]:
    """The state at each row and step: that of the automaton's MDP, or else the prompt and the response so far."""
    mask = episodes.response_mask
    rows = mask.nonzero().tolist()
    if not isinstance(optimal, AutomatonPolicy):
        prompts = episodes.prompt_index.tolist()
        ids = episodes.response_ids.tolist()
        return {(b, t): (prompts[b], tuple(ids[b][:t])) for b, t in rows}
    state = optimal.begin(episodes.prompt_ids, episodes.prompt_mask, mask.shape[1])
    coordinates = [state.coordinates]
    for t in range(mask.shape[1] - 1):
        state.step(episodes.response_ids[:, t])
        coordinates.append(state.coordinates)
    numbers = torch.stack(coordinates, 2).permute(1, 2, 0).tolist()
    return {(b, t): tuple(numbers[b][t]) for b, t in rows}


def _compare_mean_tokens(sampled: _Sampled, rows: Tensor, t: int) -> tuple[TokenOdds, TokenOdds]:
    """`compare_tokens` of the mean distributions at step t of some episodes."""
    episodes = sampled.episodes[rows]
    horizon = episodes.response_ids.shape[1]
    started = replace(episodes, response_mask=episodes.response_mask & (torch.arange(horizon) <= t))
    means = []
    for read in (
        make_sampled_logits(sampled.policy, sampled.sampler, horizon),
        make_episode_logits(sampled.optimal),
    ):
        logits = read(started).cpu().double().view(len(episodes), t + 1, -1)[:, t]
        means.append(logits.softmax(-1).mean(0).log())
    legal = sampled.lm.legal_table.nonzero().squeeze(1)
    return compare_tokens(sampled.lm, legal, means[0][legal], means[1][legal])


def _weigh(sampled: _Sampled, task: Task, optimum: Optimum) -> Masses:
    """What samples of the policy show of the masses of responses: its pass@1, and what pi* has elsewhere.

    The mass lost is E_pi max(0, 1 - pi*(y) / pi(y)), the total variation distance.
    """
    log_ratio = (sampled.gaps.optimal_log_probs - sampled.gaps.log_probs).sum(1)
    lost = (1 - log_ratio.exp()).clamp(min=0).mean().item()
    top = find_best(optimum, task)
    if top is None:
        return Masses(None, None, None, lost, None, None)
    scores = sampled.episodes.scores.double().view(len(top.scores), -1)
    reached = scores >= top.scores.unsqueeze(1) - _SAME_SCORE * top.scores.abs().clamp(min=1).unsqueeze(1)
    return Masses(
        best=reached.double().mean().item(),
        optimal_best=top.optimal.mean().item(),
        reference_best=top.reference.mean().item(),
        lost=lost,
        overconfident=None,
        underexplored=None,
    )
