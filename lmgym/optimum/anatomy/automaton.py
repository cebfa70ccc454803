"""The gap of a policy that is a function of the state, where the reference is a table and an automaton pays.

Visits are carried forward over all states (step, context, automaton state), so it is exact.

Shapes: n prompts with one automaton, T steps, V vocabulary, S automaton states, C contexts, in G groups of K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.intervals import Interval
from lmgym.kl import entropy, exact
from lmgym.models.policy import Policy
from lmgym.models.texts import Texts
from lmgym.optimum.anatomy.best import best_of_solution
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
from lmgym.optimum.automaton import AutomatonPolicy, AutomatonSolution, PolicyLogits, ReferenceTable
from lmgym.optimum.exact import MAX_ENTRIES, find_state_logits
from lmgym.tasks.base import Task


@dataclass(frozen=True, eq=False)
class _Walk:
    """What a policy does on the n prompts of one solution.

    Attributes:
        solution: pi* and V*. logits: the policy.
        visits: (T, G, K, S) the sums over the prompts. kl: (T, G, K, S) nats.
        by_prompt: (n, T) shares. running: (T,) sums over the prompts. entropy, optimal_entropy: (T,) sums of visits
            times entropy.
        returns: (n,) J.
    """

    solution: AutomatonSolution
    logits: PolicyLogits
    visits: Tensor
    kl: Tensor
    by_prompt: Tensor
    running: Tensor
    entropy: Tensor
    optimal_entropy: Tensor
    returns: Tensor


@torch.no_grad()
def dissect_automaton(policy: Policy, task: Task, split: str, most: int = MOST_STATES) -> GapAnatomy | None:
    """Takes the gap of a policy apart by dynamic programming.

    Args:
        policy: the reference, another table, or a `StatePolicy`.
        task, split: a task that `solve_automaton` solves, and which of its prompts. most: how many states to list.

    Returns:
        None for a policy that depends on more than the state, and where there are too many states to look at.

    Raises:
        InvalidArgumentError: for a task that it does not solve, and where the gap is no sum over states.
    """
    check_additive(task)
    lm = task.reference("cpu")
    prompts = [tuple(ids) for ids in lm.encode_all(tuple(task.prompts[split]))]
    optimal = AutomatonPolicy(task, prompts)
    chosen: list[tuple[AutomatonSolution, PolicyLogits]] = []
    entries = 0
    for solution in optimal.solutions:
        table = optimal.reference
        entries += solution.mdp.horizon * solution.mdp.num_states * math.prod(table.shape) * table.vocab_size
        first = prompts[int(solution.prompts[0])]
        logits = find_state_logits(policy, table, first, solution.mdp.automaton)
        if logits is None or entries > MAX_ENTRIES:
            return None
        chosen.append((solution, logits))
    walks = [_walk(solution, logits) for solution, logits in chosen]
    count = len(prompts)
    by_prompt = torch.zeros((count, task.max_new_tokens), dtype=torch.float64)
    values = torch.zeros((2, count), dtype=torch.float64)
    for walk in walks:
        by_prompt[walk.solution.prompts] = walk.by_prompt
        values[0, walk.solution.prompts] = walk.solution.roots()
        values[1, walk.solution.prompts] = walk.returns
    running = torch.stack([walk.running for walk in walks]).sum(0)
    optimum, value = values.mean(1).tolist()
    return GapAnatomy(
        method="automaton",
        optimum=optimum,
        value=value,
        gap=Interval.point(optimum - value),
        by_step=[Interval.point(x) for x in by_prompt.mean(0).tolist()],
        by_prompt=by_prompt.tolist(),
        running=(running / count).tolist(),
        entropy=divide(torch.stack([walk.entropy for walk in walks]).sum(0), running),
        optimal_entropy=divide(torch.stack([walk.optimal_entropy for walk in walks]).sum(0), running),
        states=_list_states(lm, task, prompts, walks, most),
        masses=_weigh(walks, count),
    )


def _walk(solution: AutomatonSolution, logits: PolicyLogits) -> _Walk:
    """Carries the visits of each prompt forward, and compares the policy with pi* on the way."""
    mdp = solution.mdp
    task = mdp.task
    shape = (*mdp.reference.shape, mdp.num_states)
    count = len(solution.contexts)
    mass = torch.zeros((count, *shape), dtype=torch.float64)
    group, member = mdp.reference.locate(solution.contexts)
    mass[torch.arange(count), group, member, mdp.automaton.initial] = 1.0
    visits, kl = torch.zeros((2, mdp.horizon, *shape), dtype=torch.float64)
    by_prompt = torch.zeros((count, mdp.horizon), dtype=torch.float64)
    entropies = torch.zeros((2, mdp.horizon), dtype=torch.float64)
    for t in range(mdp.horizon):
        visits[t] = mass.sum(0)
        taken = mass.new_zeros((count, shape[0], *mdp.delta.shape))
        for g, members, state, own, _ in mdp.iterate_states(t, logits):
            weights = visits[t, g, members, state]
            if not weights.any():
                continue
            contexts = mdp.reference.contexts_in(g, members)
            best = solution.log_policy(t, contexts, torch.full_like(contexts, state))
            kl[t, g, members, state] = exact(own, best)
            entropies[0, t] += weights @ entropy(own)
            entropies[1, t] += weights @ entropy(best)
            taken[:, g, :, state] += mass[:, g, members, state] @ own.exp()
        by_prompt[:, t] = task.kl_coef * task.gamma**t * (mass * kl[t]).flatten(1).sum(1)
        mass = mdp.carry(t, taken)
    running = visits.flatten(1).sum(1)
    returns = solution.evaluate(logits).returns
    return _Walk(solution, logits, visits, kl, by_prompt, running, entropies[0], entropies[1], returns)


def _list_states(
    lm: Texts, task: Task, prompts: list[tuple[int, ...]], walks: list[_Walk], most: int
) -> list[StateGap]:
    """The states with the largest shares."""
    found = []
    for number, walk in enumerate(walks):
        discounts = task.gamma ** torch.arange(task.max_new_tokens, dtype=torch.float64)
        shares = task.kl_coef * discounts.view(-1, 1, 1, 1) * walk.visits * walk.kl / len(prompts)
        values, indices = shares.flatten().topk(min(most, shares.numel()))
        found += [(value, number, index) for value, index in zip(values.tolist(), indices.tolist(), strict=True)]
    best = sorted(found, reverse=True)[:most]
    return [
        _describe(lm, prompts, walks[number], index, value) for value, number, index in best if value >= LEAST_SHARE
    ]


def _describe(lm: Texts, prompts: list[tuple[int, ...]], walk: _Walk, index: int, share: float) -> StateGap:
    """The state at an index into the flattened (T, G, K, S) numbers of a walk."""
    solution = walk.solution
    table = solution.mdp.reference
    t, g, member, q = (int(i) for i in torch.unravel_index(torch.tensor(index), walk.kl.shape))
    context = table.contexts_in(g, torch.tensor([member]))
    state = torch.tensor([q])
    legal = table.legal.nonzero().squeeze(1)
    own = walk.logits(t, context, state)[0, legal].double().log_softmax(-1)
    too_likely, too_unlikely = compare_tokens(lm, legal, own, solution.log_policy(t, context, state)[0, legal])
    only = prompts[int(solution.prompts[0])] if len(solution.prompts) == 1 else None
    return StateGap(
        prompt=None if only is None else lm.decode_prompt(only),
        response=last_tokens(lm, table, int(context), t),
        step=t,
        automaton_state=q,
        visits=walk.visits[t, g, member, q].item() / len(prompts),
        kl=walk.kl[t, g, member, q].item(),
        share=Interval.point(share),
        too_likely=too_likely,
        too_unlikely=too_unlikely,
    )


def last_tokens(lm: Texts, table: ReferenceTable, context: int, t: int) -> str:
    """The tokens of a response that a context knows of, at most as many as there are."""
    tokens = [context // table.size, context % table.size][2 - table.order :] if table.order else []
    return "".join(lm.pieces([], tokens[max(len(tokens) - t, 0) :]))


def _weigh(walks: list[_Walk], count: int) -> Masses:
    """How often the highest score is reached."""
    sums = torch.zeros(3, dtype=torch.float64)
    for walk in walks:
        top = best_of_solution(walk.solution)
        if top is None:
            return Masses(None, None, None, None, None, None)
        scores, own = walk.solution.score_distribution(walk.logits)
        reached = scores >= top.scores.unsqueeze(1)
        sums += torch.stack([(own * reached).sum(), top.optimal.sum(), top.reference.sum()])
    own_best, optimal_best, reference_best = (sums / count).tolist()
    return Masses(own_best, optimal_best, reference_best, None, None, None)
