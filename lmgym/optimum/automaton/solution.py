"""V* and pi* of every state of an `AutomatonMDP`.

Shapes: T horizon, V vocabulary, S automaton states, C contexts, in G groups of K members (`ReferenceTable`), n rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.optimum.automaton.logspace import log_matmul
from lmgym.optimum.automaton.mdp import AutomatonMDP, Performance, PolicyLogits
from lmgym.optimum.lengths import discounts_by_length, is_late, length_multiplier


class AutomatonSolution:
    """V* and pi* of an `AutomatonMDP`.

    `dense_kl=False` at gamma < 1 pays the whole KL with the discount d_n = gamma^(n-1) of the last reward, and

        pi*(y) = pi_ref(y) exp(score / b - 1 - lam / (b d_n)),    V*(x) = lam + b E_{pi*} d_n,    b = kl_coef

    with lam the root of sum_y pi*(y) = 1. The terms in n alone are then a payment at the end, and the recursion is the
    one at gamma = 1. Since lam depends on the prompt, such a solution holds for one start.

    Args:
        mdp: what is solved. contexts: (n,) in which the responses to its prompts start.
        prompts: (n,) the indices of these prompts in their split; -1 of one from elsewhere.

    Attributes:
        mdp, contexts, prompts: as given.

    Raises:
        InvalidArgumentError: for token payments at gamma < 1 with a dense KL.
    """

    def __init__(self, mdp: AutomatonMDP, contexts: Tensor, prompts: Tensor) -> None:
        self.mdp = mdp
        self.contexts = contexts
        self.prompts = prompts
        task = mdp.task
        horizon = mdp.horizon
        if task.dense_kl and task.gamma < 1 and mdp.pays_tokens:
            raise InvalidArgumentError(
                f"`gamma` must be 1 where an automaton pays for tokens, got {task.gamma!r}: they are paid at the end, "
                "so their sum would have to be part of the state. `solve_tree` takes small tasks."
            )
        self._discount = task.gamma if task.dense_kl else 1.0
        self._steps = torch.zeros(horizon, dtype=torch.float64)  # what one token more adds to the payment for length
        self._multiplier: float | None = None
        if is_late(task):
            self._discounts = discounts_by_length(task.gamma, horizon)
            log_weights = mdp.log_length_weights(int(contexts[0]))
            self._multiplier = length_multiplier(log_weights, self._discounts, task.kl_coef)
            self._steps[:-1] = self._multiplier * (1 / self._discounts[:-1] - 1 / self._discounts[1:])
        shape = (horizon, *mdp.reference.shape, mdp.num_states)
        self._tables = torch.empty(shape, dtype=torch.float64)  # V*, of a late KL minus the payment for t tokens
        for t in reversed(range(horizon)):
            self._tables[t] = task.kl_coef * log_matmul(mdp.reference.factors, self._q(t) / task.kl_coef)
        if self._multiplier is not None:
            self._log_discounts = self._expect_discounts()

    def _q(self, t: int) -> Tensor:
        """(G or 1, V, S) Q* at step t; -inf for ids that are no actions."""
        mdp = self.mdp
        after = None if t == mdp.horizon - 1 else self._discount * self._tables[t + 1] + self._steps[t]
        q = mdp.token_payments + mdp.follow(t, mdp.payments, after)
        return torch.where(mdp.reference.legal[:, None], q, -torch.inf)

    def _expect_discounts(self) -> Tensor:
        """(T, G, K, S) log E_{pi*} gamma^(n-1-t): the discount of the last reward, seen from each state."""
        mdp = self.mdp
        result = torch.empty_like(self._tables)
        price = mdp.task.kl_coef
        log_gamma = math.log(mdp.task.gamma) if mdp.task.gamma else -math.inf
        for t in reversed(range(mdp.horizon)):
            after = None if t == mdp.horizon - 1 else result[t + 1] + log_gamma
            discounted = self._q(t) / price + mdp.follow(t, torch.zeros_like(mdp.payments), after)
            result[t] = log_matmul(mdp.reference.factors, discounted) - self._tables[t] / price
        return result

    @property
    def values(self) -> Tensor:
        """(T, C, S) float64: V*(t, context, state) without token payments collected before, in the model's order of C.

        Raises:
            InvalidArgumentError: with `dense_kl=False` at gamma < 1, where the recursion has other numbers.
        """
        if self._multiplier is not None:
            raise InvalidArgumentError("`gamma` must be 1 for the table of V* where `dense_kl` is False.")
        tables = self._tables.transpose(1, 2) if self.mdp.reference.order == 2 else self._tables
        return tables.flatten(1, 2)

    def value(self, t: int, contexts: Tensor, states: Tensor) -> Tensor:
        """(n,) V* at step t of contexts (n,) and automaton states (n,), without token payments collected before.

        With `dense_kl=False` at gamma < 1 it is the expected discounted return from there on. That includes the whole
        KL of the tokens before, which is not paid yet; under pi* it depends on the state alone.
        """
        entries = (*self.mdp.reference.locate(contexts), states)
        if self._multiplier is None:
            return self._tables[t][entries]
        kl_coef = self.mdp.task.kl_coef
        return self._multiplier / self._discounts[t] + kl_coef * self._log_discounts[t][entries].exp()

    def q(self, t: int, contexts: Tensor, states: Tensor) -> Tensor:
        """(n, V) Q* at step t of contexts (n,) and automaton states (n,), as `value`; -inf for ids that are no actions.

        With `dense_kl=False` at gamma < 1 they are those of the recursion: each row is right up to a constant.
        """
        q = self._q(t)
        return q[self.mdp.reference.locate(contexts)[0].clamp(max=len(q) - 1), :, states]

    def log_policy(self, t: int, contexts: Tensor, states: Tensor) -> Tensor:
        """(n, V) log pi* at step t of contexts (n,) and automaton states (n,), in nats."""
        weights = self.q(t, contexts, states) / self.mdp.task.kl_coef
        return (self.mdp.reference.probs(contexts).log() + weights).log_softmax(-1)

    def roots(self, contexts: Tensor | None = None) -> Tensor:
        """(n,) V*(x) of responses that start in contexts (n,); in those of its prompts if None."""
        contexts = self.contexts if contexts is None else contexts
        return self.value(0, contexts, torch.full_like(contexts, self.mdp.automaton.initial))

    def evaluate(self, policy_logits: PolicyLogits | None = None) -> Performance:
        """What a policy earns on the prompts, exactly; None is the reference, `log_policy` the optimum."""
        return self.mdp.evaluate(self.contexts, policy_logits)

    def score_distribution(self, policy_logits: PolicyLogits | None = None) -> tuple[Tensor, Tensor]:
        """(k,) scores and (n, k) how often a policy gets them on the prompts; see `AutomatonMDP.score_distribution`."""
        return self.mdp.score_distribution(self.contexts, policy_logits)
