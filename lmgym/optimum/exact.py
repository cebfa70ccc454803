"""What a policy earns on a task, computed without sampling where that is possible.

Shapes: X prompts, R responses of all prompts together, C contexts, V vocabulary, S automaton states, T horizon.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lmgym.automata import Automaton
from lmgym.episodes import Episodes
from lmgym.models.causal import CausalLM
from lmgym.models.markov import MarkovLM
from lmgym.models.policy import CausalPolicy, Policy
from lmgym.models.sampling import Sampler
from lmgym.optimum.answer import expected_reward
from lmgym.optimum.automaton import AutomatonMDP, PolicyLogits, ReferenceTable
from lmgym.optimum.lengths import is_late
from lmgym.optimum.tree import EpisodeLogits, Tree, count_responses, make_episode_logits
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks.base import Task

MAX_RESPONSES = 40_000  # that are enumerated, of all prompts together
MAX_ENTRIES = 1 << 26  # probabilities of a policy that are looked up, state by state
_ENTRIES_PER_CALL = 1 << 12  # looking up so many of them takes as long as one call


@runtime_checkable
class StatePolicy(Protocol):
    """A policy whose next token depends on the step, the context and the state of the automaton alone."""

    def state_logits(self, prompt_ids: tuple[int, ...], automaton: Automaton) -> PolicyLogits | None:
        """Its logits as a function of these; None if they depend on anything but this automaton's states."""


def exact_metrics(
    policy: Policy,
    task: Task,
    split: str,
    sampler: Sampler | None = None,
    reference: CausalLM | None = None,
) -> dict[str, float]:
    """`return`, `score` and `kl` of a policy on a split: what `lmgym.evaluation.evaluate` estimates.

    Dynamic programming gives them if the reference is a table, the reward an automaton, and the policy the reference,
    another table or a `StatePolicy` (pi*, and the uniform one). Else all responses are enumerated if there are at most
    `MAX_RESPONSES`. A noisy reward counts as its mean.

    Args:
        policy: what is graded.
        task, split: what it is graded on.
        sampler: what its tokens are drawn with, given its logits.
        reference: the task's reference if it is already loaded, on any device. A large one is then not loaded again.

    Returns:
        The means over prompts, without those that neither way gives. The KL of the reference is always there: it is 0.
    """
    lm = reference or task.reference("cpu")
    is_reference = False
    if sampler in (None, Sampler()):
        is_reference = isinstance(policy, CausalPolicy) and policy.lm is lm
        if isinstance(lm.model, MarkovLM):
            found = _by_states(policy, task, split, is_reference)
            if found is not None:
                return found
    if task.kl_coef <= 0 or count_responses(task, lm) * len(task.prompts[split]) > MAX_RESPONSES:
        return {"kl": 0.0} if is_reference else {}
    tree = Tree.of(task, split, MAX_RESPONSES)
    earned = tree.evaluate(make_sampled_logits(policy, sampler or Sampler(), task.max_new_tokens))
    return {name: earned.metrics[name] for name in ("return", "score", "kl")}


def make_sampled_logits(policy: Policy, sampler: Sampler, horizon: int) -> EpisodeLogits:
    """A function that gives the log-probs with which a sampler draws from a policy's logits."""
    read_logits = make_episode_logits(policy)
    if sampler == Sampler():
        return read_logits

    def read_sampled_logits(episodes: Episodes) -> Tensor:
        mask = episodes.response_mask
        positions = torch.arange(horizon).expand_as(mask)[mask]
        return sampler.log_distribution(read_logits(episodes).cpu(), positions)

    return read_sampled_logits


def _by_states(policy: Policy, task: Task, split: str, is_reference: bool) -> dict[str, float] | None:
    """The metrics by backward recursion over (step, context, automaton state), where the policy depends on no more."""
    lm = task.reference("cpu")
    reward = expected_reward(task)
    if not isinstance(reward, AutomatonReward):
        return None
    table = ReferenceTable(lm)
    end_rule = task.end_rule(lm)
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for ids in lm.encode_all(tuple(task.prompts[split])):
        start = table.first_context(ids) if is_late(task) else -1
        groups.setdefault((id(reward.for_prompt(ids)), start), []).append(tuple(ids))
    sums = torch.zeros(3, dtype=torch.float64)
    entries = 0
    for prompts in groups.values():
        mdp = AutomatonMDP(table, reward.for_prompt(prompts[0]), task, end_rule)
        logits = None
        if not is_reference:
            logits = find_state_logits(policy, table, prompts[0], mdp.automaton)
            entries += mdp.num_states * mdp.horizon * (math.prod(table.shape) * table.vocab_size + _ENTRIES_PER_CALL)
            if logits is None or entries > MAX_ENTRIES:
                return None
        earned = mdp.evaluate(torch.tensor([table.first_context(ids) for ids in prompts]), logits)
        kl = torch.zeros_like(earned.kl) if is_reference else earned.kl
        sums += torch.stack([earned.returns, earned.score, kl]).sum(1)
    means = sums / len(task.prompts[split])
    return dict(zip(("return", "score", "kl"), means.tolist(), strict=True))


def find_state_logits(
    policy: Policy, reference: ReferenceTable, prompt_ids: tuple[int, ...], automaton: Automaton
) -> PolicyLogits | None:
    """The logits of a policy as a function of the state, or None where it may depend on more."""
    if isinstance(policy, StatePolicy):
        return policy.state_logits(prompt_ids, automaton)
    if not isinstance(policy, CausalPolicy) or not isinstance(policy.lm.model, MarkovLM) or policy.lm.temperature != 1:
        return None
    table = ReferenceTable(policy.lm)
    if (table.order, table.size, table.vocab_size) != (reference.order, reference.size, reference.vocab_size):
        return None
    return lambda t, contexts, states: table.probs(contexts).log()
