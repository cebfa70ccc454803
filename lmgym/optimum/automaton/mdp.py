"""The token MDP of a reference table and one automaton.

Shapes: T horizon, V vocabulary, S automaton states, C contexts, in G groups of K that share what follows an action
(order 0: G = K = 1; order 1: G = 1, K = V; order 2: the K contexts of a group have one last token), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.automata import Automaton
from lmgym.ending import EndRule
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.automaton.logspace import log_matmul, log_scatter
from lmgym.optimum.automaton.reference import MAX_ENTRIES_AT_ONCE, ReferenceTable
from lmgym.optimum.lengths import is_late
from lmgym.tasks.base import Task

PolicyLogits = Callable[[int, Tensor, Tensor], Tensor]
"""(t, contexts (n,), automaton states (n,)) -> (n, V) logits: a policy that is a function of the state."""

MAX_SUMS = 1 << 28  # that `best_response` compares: some 10 s


@dataclass(frozen=True, eq=False)
class Performance:
    """What a policy earns on n prompts, exactly.

    Attributes:
        returns: (n,) float64, J, in units of the score.
        kl: (n,) float64, KL(pi || pi_ref) in nats an episode.
        score: (n,) float64, the expected score as paid, not discounted.
    """

    returns: Tensor
    kl: Tensor
    score: Tensor


class AutomatonMDP:
    """The token MDP of a reference table and one automaton, and what a policy earns that is a function of its state.

    Args:
        reference: pi_ref. automaton: what pays. task: the numbers. end_rule: when a response ends.

    Attributes:
        reference, automaton, task: as given. horizon: T. num_states: S.
        delta: (V, S) int64, the next automaton state. pays_tokens: whether any token is paid for before the end.
        token_payments: (V, S) float64, paid for a token. payments: (V, S) float64, paid in addition if it ends.
    """

    def __init__(self, reference: ReferenceTable, automaton: Automaton, task: Task, end_rule: EndRule[Tensor]) -> None:
        size = len(automaton.classes)
        if size < reference.vocab_size:
            raise InvalidArgumentError(
                f"`classes` of the automaton must cover the {reference.vocab_size} tokens, got {size}."
            )
        self.reference = reference
        self.automaton = automaton
        self.task = task
        self.horizon = task.max_new_tokens
        self.num_states = len(automaton.payments)
        columns = automaton.classes[: reference.vocab_size]
        self.delta = torch.from_numpy(automaton.transitions[:, columns].T.copy())  # (V, S) next automaton states
        paid = automaton.token_payments
        self.pays_tokens = paid is not None and bool(paid.any())
        self.token_payments = torch.zeros(self.delta.shape, dtype=torch.float64)
        if paid is not None:
            self.token_payments = torch.from_numpy(paid[:, columns].T.copy())
        no_eos = (~end_rule.is_eos[:, None]).double()
        self.payments = torch.from_numpy(automaton.payments)[self.delta] - task.missing_eos_penalty * no_eos
        self._end_rule = end_rule

    def ends(self, t: int) -> Tensor:
        """(V, 1) bool: whether an action at step t ends the episode."""
        return self._end_rule.find_ending_tokens(t)[:, None]

    def follow(self, t: int, ending: Tensor, after: Tensor | None) -> Tensor:
        """The numbers of what each action at step t leads to, by group, action and automaton state.

        Args:
            t: the step. ending: (..., V, S), of actions that end the episode.
            after: (..., G, K, S), of the states that the other actions lead to; None where all actions end.

        Returns:
            (..., G or 1, V, S).
        """
        ending = ending.unsqueeze(-3)
        if after is None:
            return ending
        moved = self.reference.after(after)
        return torch.where(self.ends(t), ending, moved.gather(-1, self.delta.expand(moved.shape)))

    def evaluate(self, contexts: Tensor, policy_logits: PolicyLogits | None = None) -> Performance:
        """What a policy earns, by backward recursion over all states.

        Args:
            contexts: (n,) in which responses start. policy_logits: the policy; None is the reference.
        """
        task = self.task
        zero = torch.zeros_like(self.payments)
        # Return, the discount that the last reward will have, score, KL.
        endings = torch.stack([self.payments, zero + 1.0, self.payments, zero])
        discounts = torch.tensor([task.gamma, task.gamma, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
        tables: Tensor | None = None
        for t in reversed(range(self.horizon)):
            q = self.follow(t, endings, None if tables is None else discounts * tables).clone()
            # The last reward pays the token payments with the score, and the KL too where it is not dense.
            by_end = q[1]
            q[0] += self.token_payments * by_end
            q[2] += self.token_payments
            if policy_logits is None:
                tables = self.reference.expect(q)
            else:
                priced = -task.kl_coef * (torch.ones_like(by_end) if task.dense_kl else by_end)
                tables = self._means(t, q, priced, policy_logits)
        assert tables is not None
        group, member = self.reference.locate(contexts)
        returns, _, score, kl = tables[:, group, member, self.automaton.initial]
        return Performance(returns, kl, score)

    def best_response(self, contexts: Tensor) -> Tensor:
        """(n,) float64: max over y of J(y), what a policy earns that gives one response for certain; log pi is then 0.

        It is the recursion of V* with a maximum instead of the sum. Where a late KL is discounted, each length has a
        recursion of its own, T times the work.

        Args:
            contexts: (n,) in which responses start.

        Raises:
            InvalidArgumentError: for token payments at gamma < 1 with a dense KL, and where more than some 10^8 sums
                would have to be compared.
        """
        task = self.task
        late = is_late(task)
        sweeps = (self.horizon + 1) / 2 if late else 1
        entries = math.prod(self.reference.shape) * self.reference.vocab_size * self.num_states * self.horizon * sweeps
        if entries > MAX_SUMS:
            raise InvalidArgumentError(f"`task` must have at most {MAX_SUMS:.0e} sums to compare, got {entries:.0e}.")
        if task.dense_kl and task.gamma < 1 and self.pays_tokens:
            raise InvalidArgumentError(f"`gamma` must be 1 where an automaton pays for tokens, got {task.gamma!r}.")
        discount = task.gamma if task.dense_kl else 1.0
        group, member = self.reference.locate(contexts)
        found = []
        for last in range(self.horizon) if late else (None,):
            tables: Tensor | None = None
            for t in reversed(range(self.horizon if last is None else last + 1)):
                allowed = last is None or t == last
                ending = torch.where(self.ends(t) & allowed, self.payments, -torch.inf)
                tables = self._largest(self.follow(t, ending, None if tables is None else discount * tables))
            assert tables is not None
            sums = tables[group, member, self.automaton.initial]
            found.append(sums if last is None else torch.where(sums.isinf(), sums, task.gamma**last * sums))
        return torch.stack(found).amax(0)

    def _largest(self, q: Tensor) -> Tensor:
        """(G, K, S) max over actions of kl_coef log pi_ref + q, with q (G or 1, V, S) and the token payments."""
        q = q + self.token_payments
        groups, size = self.reference.shape
        tables = torch.empty((groups, size, self.num_states), dtype=torch.float64)
        for group in range(groups):
            for members in torch.arange(size).split(max(MAX_ENTRIES_AT_ONCE // q[0].numel(), 1)):
                log_ref = self.reference.probs(self.reference.contexts_in(group, members)).log()
                priced = (self.task.kl_coef * log_ref).masked_fill(~self.reference.legal, -torch.inf)
                tables[group, members] = (priced.unsqueeze(-1) + q[min(group, len(q) - 1)]).amax(1)
        return tables

    def _means(self, t: int, q: Tensor, priced: Tensor, policy_logits: PolicyLogits) -> Tensor:
        """(4, G, K, S) expectations of q (4, G or 1, V, S) under a policy, the KL of this step included."""
        tables = torch.zeros((4, *self.reference.shape, self.num_states), dtype=torch.float64)
        last = q.shape[1] - 1
        for group, members, state, log_probs, log_ref in self.iterate_states(t, policy_logits):
            probs = log_probs.exp()
            log_ratio = torch.where(probs > 0, log_probs - log_ref, 0.0)
            g = min(group, last)
            tables[:, group, members, state] = (probs @ q[:, g, :, state].T).T
            tables[0, group, members, state] += (probs * log_ratio) @ priced[g, :, state]
            tables[3, group, members, state] += (probs * log_ratio).sum(-1)
        return tables

    def iterate_states(self, t: int, policy_logits: PolicyLogits) -> Iterator[tuple[int, Tensor, int, Tensor, Tensor]]:
        """Group, members (n,), automaton state, (n, V) log pi and (n, V) log pi_ref at step t, over all states."""
        groups, size = self.reference.shape
        for group in range(groups):
            for members in torch.arange(size).split(max(MAX_ENTRIES_AT_ONCE // self.reference.vocab_size, 1)):
                contexts = self.reference.contexts_in(group, members)
                log_ref = self.reference.probs(contexts).log()
                for state in range(self.num_states):
                    logits = policy_logits(t, contexts, torch.full_like(members, state)).double()
                    log_probs = logits.masked_fill(~self.reference.legal, -torch.inf).log_softmax(-1)
                    yield group, members, state, log_probs, log_ref

    def score_distribution(self, contexts: Tensor, policy_logits: PolicyLogits | None = None) -> tuple[Tensor, Tensor]:
        """How often a policy gets which score, found by carrying its probability forward.

        Args:
            contexts: (n,) in which responses start. policy_logits: the policy; None is the reference.

        Returns:
            (k,) distinct scores as paid, ascending, and (n, k) their probabilities.

        Raises:
            InvalidArgumentError: if the automaton pays for tokens on the way, which a state does not know.
        """
        if self.pays_tokens:
            raise InvalidArgumentError("`token_payments` must be None or 0 for the distribution of scores.")
        scores, outcome = self.payments.unique(return_inverse=True)
        result = torch.zeros((len(contexts), len(scores)), dtype=torch.float64)
        mass = torch.zeros((len(contexts), *self.reference.shape, self.num_states), dtype=torch.float64)
        group, member = self.reference.locate(contexts)
        mass[torch.arange(len(contexts)), group, member, self.automaton.initial] = 1.0
        for t in range(self.horizon):
            if policy_logits is None:
                taken = mass
                for factor in reversed(self.reference.transpose()):
                    taken = factor @ taken
            else:
                taken = mass.new_zeros((*mass.shape[:2], *self.delta.shape))
                for g, members, state, log_probs, _ in self.iterate_states(t, policy_logits):
                    taken[:, g, :, state] += mass[:, g, members, state] @ log_probs.exp()
            ended = torch.where(self.ends(t), taken, 0.0).sum(1).flatten(1)
            result.index_add_(1, outcome.flatten(), ended)
            mass = self.carry(t, taken)
        return scores, result

    def carry(self, t: int, taken: Tensor) -> Tensor:
        """(..., G, K, S): the probability of each state at step t + 1, from that of the actions (..., G, V, S) at t."""
        going = torch.where(self.ends(t), 0.0, taken)
        moved = torch.zeros_like(going).scatter_add_(-1, self.delta.expand(going.shape), going)
        return self.reference.add_arrivals(moved, 0.0, lambda x: x.sum(-2))

    def log_length_weights(self, context: int) -> Tensor:
        """(T,) log sum over responses y of n tokens, n = 1 ... T, of pi_ref(y) exp(score(y) / kl_coef)."""
        price = self.task.kl_coef
        reference = self.reference
        mass = torch.full((*reference.shape, self.num_states), -torch.inf, dtype=torch.float64)
        group, member = reference.locate(torch.tensor(context))
        mass[group, member, self.automaton.initial] = 0.0
        result = torch.zeros(self.horizon, dtype=torch.float64)
        for t in range(self.horizon):
            taken = log_matmul(reference.transpose(), mass) + self.token_payments / price
            result[t] = torch.where(self.ends(t), taken + self.payments / price, -torch.inf).flatten().logsumexp(0)
            going = taken.masked_fill(self.ends(t), -torch.inf)
            mass = reference.add_arrivals(log_scatter(going, self.delta), -torch.inf, lambda x: x.logsumexp(-2))
        return result
