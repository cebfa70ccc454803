"""The gap of a policy on a task whose responses can all be written down: exact, state by state.

Shapes: X prompts, R responses of all prompts together, T steps, A legal tokens, and N_t the prefixes of t tokens of one
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmgym.intervals import Interval
from lmgym.kl import entropy, exact
from lmgym.optimum.anatomy.parts import (
    LEAST_SHARE,
    MOST_STATES,
    GapAnatomy,
    Masses,
    StateGap,
    check_additive,
    compare_tokens,
    divide,
)
from lmgym.optimum.tree import EpisodeLogits, Tree
from lmgym.optimum.tree.responses import Responses

_TIE = 1e-9  # scores so close are the same


@torch.no_grad()
def dissect_tree(tree: Tree, episode_logits: EpisodeLogits, most: int = MOST_STATES) -> GapAnatomy:
    """Takes the gap of any policy apart, by enumeration.

    Args:
        tree: all responses. episode_logits: the policy (`make_episode_logits`). most: how many states to list.

    Raises:
        InvalidArgumentError: at `kl_coef=0`, and at gamma < 1 where the KL is paid at the end.
    """
    task = tree.task
    check_additive(task)
    found = tree.solve_levels()
    own = tree.responses.read(episode_logits)
    reach = visits(tree.responses, own)
    kl = [exact(p, q) for p, q in zip(own, found.log_probs, strict=True)]
    shares = [task.kl_coef * task.gamma**t * reach[t] * kl[t] for t in range(len(own))]
    by_prompt = torch.stack([share.sum(1) for share in shares], 1)
    running = torch.stack([level.sum(1).mean() for level in reach])
    entropies = [_mean_entropy(reach, levels) for levels in (own, found.log_probs)]
    optimum = found.values[0].mean().item()
    value = soft_values(tree, own).values[0].mean().item()
    return GapAnatomy(
        method="tree",
        optimum=optimum,
        value=value,
        gap=Interval.point(optimum - value),
        by_step=[Interval.point(x) for x in by_prompt.mean(0).tolist()],
        by_prompt=by_prompt.tolist(),
        running=running.tolist(),
        entropy=divide(entropies[0], running),
        optimal_entropy=divide(entropies[1], running),
        states=_list_states(tree, _Levels(own, found.log_probs, reach, kl, shares), most),
        masses=_weigh(tree, own, found.log_probs),
    )


def visits(responses: Responses, log_probs: Sequence[Tensor]) -> list[Tensor]:
    """(X, N_t) of each level: the probability that a response to its prompt comes through a prefix.

    Args:
        responses: of the tree. log_probs: (X, N_t, A) of each level, the policy.
    """
    reach = [torch.ones((len(responses.prompts), 1), dtype=torch.float64)]
    for level, levels in zip(responses.levels[:-1], log_probs[:-1], strict=True):
        reach.append((reach[-1].unsqueeze(-1) * levels[..., level.going].exp()).flatten(1))
    return reach


def _mean_entropy(reach: Sequence[Tensor], levels: Sequence[Tensor]) -> Tensor:
    """(T,) sums over the states of a step of visits times entropy, the means over prompts."""
    return torch.stack([(w * entropy(p)).sum(1).mean() for w, p in zip(reach, levels, strict=True)])


@dataclass(frozen=True, eq=False)
class _Levels:
    """Numbers of every prefix, level by level: (X, N_t), and (X, N_t, A) nats for `own` and `best`."""

    own: Sequence[Tensor]
    best: Sequence[Tensor]
    reach: Sequence[Tensor]
    kl: Sequence[Tensor]
    shares: Sequence[Tensor]


def _list_states(tree: Tree, levels: _Levels, most: int) -> list[StateGap]:
    """The states with the largest shares."""
    found = []
    for t, share in enumerate(levels.shares):
        values, indices = share.flatten().topk(min(most, share.numel()))
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            found.append((value, t, index))
    return [_describe(tree, levels, t, i) for value, t, i in sorted(found, reverse=True)[:most] if value >= LEAST_SHARE]


def _describe(tree: Tree, levels: _Levels, t: int, index: int) -> StateGap:
    """The state at an index into the flattened (X, N_t) numbers of a level."""
    lm = tree.task.reference("cpu")
    prompts = tree.responses.prompts
    prompt, node = divmod(index, levels.kl[t].shape[1])
    ids = prompts[prompt]
    own = levels.own[t][prompt, node]
    too_likely, too_unlikely = compare_tokens(lm, tree.responses.legal, own, levels.best[t][prompt, node])
    return StateGap(
        prompt=lm.decode_prompt(ids),
        response=lm.completions([ids], [tree.responses.prefix(t, node)])[0],
        step=t,
        automaton_state=None,
        visits=levels.reach[t][prompt, node].item() / len(prompts),
        kl=levels.kl[t][prompt, node].item(),
        share=Interval.point(levels.shares[t][prompt, node].item() / len(prompts)),
        too_likely=too_likely,
        too_unlikely=too_unlikely,
    )


def _weigh(tree: Tree, own: Sequence[Tensor], best: Sequence[Tensor]) -> Masses:
    """Masses of whole responses under (X, N_t, A) log-probs of the policy and of pi*."""
    policy, optimal, reference = (tree.responses.add_up(levels).exp() for levels in (own, best, tree.reference))
    is_best = tree.scores >= tree.scores.amax(1, keepdim=True) - _TIE
    missing = (optimal - policy).clamp(min=0)
    lowered = policy < reference

    def mean(masses: Tensor) -> float:
        return masses.sum(1).mean().item()

    return Masses(
        best=mean(policy * is_best),
        optimal_best=mean(optimal * is_best),
        reference_best=mean(reference * is_best),
        lost=mean(missing),
        overconfident=mean(missing * lowered),
        underexplored=mean(missing * ~lowered),
    )


class SoftValues(NamedTuple):
    """What a policy may expect at every prefix and of every token, for the KL paid token by token.

    Attributes:
        values: (X, N_t) V^pi of each level: the expected discounted return from a prefix on, both halves of the KL
            included.
        advantages: (X, N_t, A) of each level: Q - kl_coef log(pi / pi_ref) - V^pi, whose mean under pi is 0; 0 where pi
            is 0.
    """

    values: list[Tensor]
    advantages: list[Tensor]


def soft_values(tree: Tree, log_probs: Sequence[Tensor]) -> SoftValues:
    """V^pi and the advantages of a policy, by one sweep from the last tokens to the first.

    Args:
        tree: all responses. log_probs: (X, N_t, A) of each level, the policy.
    """
    task = tree.task
    after = torch.zeros((len(tree.prompts), 0), dtype=torch.float64)
    values: list[Tensor] = []
    advantages: list[Tensor] = []
    for t in reversed(range(len(log_probs))):
        own = log_probs[t]
        possible = own > -torch.inf
        earned = tree.responses.join_actions(t, tree.scores, task.gamma * after)
        if task.kl_coef > 0:
            earned = earned - task.kl_coef * torch.where(possible, own - tree.reference[t], 0.0)
        after = (own.exp() * earned).sum(-1)
        values.insert(0, after)
        advantages.insert(0, torch.where(possible, earned - after.unsqueeze(-1), 0.0))
    return SoftValues(values, advantages)


def critic_targets(tree: Tree, log_probs: Sequence[Tensor]) -> list[Tensor]:
    """(X, N_t) of each level: what a critic that is trained on returns estimates at every prefix.

    It is V^pi. Where the whole KL is paid at the end, at gamma = 1, that of the prefix itself is still to pay, and is
    in it.

    Args:
        tree: all responses. log_probs: (X, N_t, A) of each level, the policy.

    Raises:
        InvalidArgumentError: at gamma < 1 where the KL is paid at the end.
    """
    task = tree.task
    values = soft_values(tree, log_probs).values
    if task.kl_coef == 0 or task.dense_kl:
        return values
    check_additive(task)
    paid = torch.zeros((len(tree.prompts), 1), dtype=torch.float64)
    targets = []
    for t, level in enumerate(tree.responses.levels):
        targets.append(values[t] - task.kl_coef * paid)
        ratio = (log_probs[t] - tree.reference[t])[..., level.going]
        paid = (paid.unsqueeze(-1) + ratio).flatten(1)
    return targets
