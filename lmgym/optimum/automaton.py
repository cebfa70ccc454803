"""V* and pi* where the reference is a `MarkovLM` and an automaton pays: dynamic programming, exact up to rounding.

A state of the MDP is then (step t, context, automaton state). The next two depend on the action and the automaton state
alone, so a backup is one product of the transition table with (V, S) numbers a group of contexts.

Shapes: T horizon, V vocabulary, S automaton states, C contexts, in G groups of K that share what follows an action
(order 0: G = K = 1; order 1: G = 1, K = V; order 2: the K contexts of a group have one last token), R rank, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.automata import Automaton
from lmgym.ending import EndRule
from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.models.markov import SMALLEST, MarkovLM
from lmgym.optimum.answer import Optimum, check_solvable, expected_reward
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks.base import Task, check_split

PolicyLogits = Callable[[int, Tensor, Tensor], Tensor]
"""(t, contexts (n,), automaton states (n,)) -> (n, V) logits: a policy that is a function of the state."""

_ENTRIES = 1 << 22  # of (rows, V) tables at once, and of factors that may be multiplied out
_MOST = 1 << 28  # of them in all, where they cannot be factored: some 10 s
_LEAST = 1e-30  # a discount below this counts as this: it changes no return, and pi* stays unique at gamma = 0


def log_matmul(factors: Sequence[Tensor], log_x: Tensor) -> Tensor:
    """log(P @ exp(log_x)) for a P > 0 given as the product of its factors, without over- or underflow.

    The largest entry of each column is taken out before exp. No sum is then below the smallest entry of P, so none that
    a float32 table has can vanish.

    Args:
        factors: P (G, n, m), or two factors of it: (G, n, R) and (G, R, m), either with G = 1.
        log_x: (G, m, S) float64, or with G = 1; -inf allowed.

    Returns:
        (G, n, S).
    """
    top = log_x.amax(-2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    total = (log_x - top).exp()
    for factor in reversed(factors):
        total = factor @ total
    return total.log() + top


class MarkovLaw:
    """pi_ref of a `MarkovLM` in float64, as factors with its contexts in groups.

    Attributes:
        factors: ((G, K, V),), or of a low-rank model ((G, K, R), (1, R, V)).
        legal: (V,) bool, ids that the tokenizer has.
        size: the model's own vocabulary, which may be larger than V; contexts are numbered with it.
    """

    def __init__(self, lm: CausalLM) -> None:
        model = lm.model
        if not isinstance(model, MarkovLM):
            raise InvalidArgumentError(f"`model` must be a MarkovLM for this solver, got {type(model).__name__}.")
        self._trunk = model.trunk
        self.vocab_size, self.size, self.order = lm.vocab_size, model.trunk.vocab_size, model.trunk.order
        self.legal = lm.legal_table
        tables = [x.detach().cpu().double() for x in (model.mixture, model.rows) if x is not None]
        if len(tables) == 2 and tables[1].min() < SMALLEST:  # the model raises small products, which do not factor
            if len(tables[0]) * self.size > _ENTRIES:
                raise InvalidArgumentError(
                    f"`rows` of a low-rank model of this size must not be below {SMALLEST:g}, got {tables[1].min():g}."
                )
            tables = [tables[0] @ tables[1]]
        rows = tables[-1].clamp(min=SMALLEST)[:, : self.vocab_size] * self.legal
        sums = rows.sum(1)
        factors = [rows / sums[:, None]]
        if len(tables) == 2:
            mixture = tables[0] * sums
            factors.insert(0, mixture / mixture.sum(1, keepdim=True))
        self.factors = [self._grouped(factors[0]), *(factor[None] for factor in factors[1:])]

    def _grouped(self, table: Tensor) -> Tensor:
        """(C, n) -> (G, K, n)."""
        if self.order < 2:
            return table[None]
        return table.view(self.size, self.size, -1).transpose(0, 1).contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """G and K."""
        return self.factors[0].shape[0], self.factors[0].shape[1]

    def place(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The group and the place in it of contexts (n,) in the model's numbering."""
        if self.order < 2:
            return torch.zeros_like(contexts), contexts
        return contexts % self.size, contexts // self.size

    def context(self, group: int, places: Tensor) -> Tensor:
        """Contexts in the model's numbering of places (n,) in a group: the inverse of `place`."""
        return places if self.order < 2 else places * self.size + group

    def first_context(self, prompt_ids: Sequence[int]) -> int:
        """The context behind a prompt."""
        ids = torch.tensor([[self._trunk.before, self._trunk.before, *prompt_ids]])
        return int(self._trunk.contexts(ids)[0, -1])

    def following(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """(n,) contexts that tokens lead to."""
        return self._trunk.following(contexts, tokens)

    def probs(self, contexts: Tensor) -> Tensor:
        """(n, V) laws of contexts (n,)."""
        rows = self.factors[0][self.place(contexts)]
        for factor in self.factors[1:]:
            rows = rows @ factor[0]
        return rows

    def mean(self, x: Tensor) -> Tensor:
        """(..., G, K, S) expectations over actions of x (..., G or 1, V, S)."""
        for factor in reversed(self.factors):
            x = factor @ x
        return x

    def transposed(self) -> list[Tensor]:
        """The factors of the table with contexts and actions swapped: what carries mass forward."""
        return [factor.mT for factor in reversed(self.factors)]

    def after(self, table: Tensor) -> Tensor:
        """(..., G or 1, V, S): a table (..., G, K, S) of contexts, at the context that each action leads to."""
        if self.order == 0:
            return table.expand(*table.shape[:-2], self.vocab_size, table.shape[-1])
        return (table.transpose(-3, -2) if self.order == 2 else table)[..., : self.vocab_size, :]

    def arrived(self, moved: Tensor, empty: float, add: Callable[[Tensor], Tensor]) -> Tensor:
        """(..., G, K, S): what left groups by actions (..., G, V, S), at the contexts it arrives in.

        Args:
            moved: what moves. empty: what a context that nothing arrives in has. add: sums over dimension -2.
        """
        if self.order == 0:
            return add(moved).unsqueeze(-2)
        full = torch.nn.functional.pad(moved, (0, 0, 0, self.shape[1] - self.vocab_size), value=empty)
        return full.transpose(-3, -2) if self.order == 2 else full


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
    """The token MDP of a reference table and one automaton, with what a policy that is a function of its state earns.

    Args:
        law: the reference. automaton: what pays. task: the numbers. end_rule: when a response ends.
    """

    def __init__(self, law: MarkovLaw, automaton: Automaton, task: Task, end_rule: EndRule[Tensor]) -> None:
        if len(automaton.classes) < law.vocab_size:
            raise InvalidArgumentError(
                f"`classes` of the automaton must cover the {law.vocab_size} tokens, got {len(automaton.classes)}."
            )
        self.law, self.automaton, self.task, self.horizon = law, automaton, task, task.max_new_tokens
        self.num_states = len(automaton.payments)
        columns = automaton.classes[: law.vocab_size]
        self.delta = torch.from_numpy(automaton.transitions[:, columns].T.copy())  # (V, S) next automaton states
        paid = automaton.token_payments
        self.pays_tokens = paid is not None and bool(paid.any())
        self.token_payments = torch.zeros(self.delta.shape, dtype=torch.float64)
        if paid is not None:
            self.token_payments = torch.from_numpy(paid[:, columns].T.copy())
        no_eos = (~end_rule.is_eos[:, None]).double()
        # (V, S) what an action that ends is paid.
        self.payments = torch.from_numpy(automaton.payments)[self.delta] - task.missing_eos_penalty * no_eos
        self._end_rule = end_rule

    def ends(self, t: int) -> Tensor:
        """(V, 1) bool: whether an action at step t ends the episode."""
        return self._end_rule.find_ending_tokens(t)[:, None]

    def follow(self, t: int, ending: Tensor, after: Tensor | None) -> Tensor:
        """What comes of each action at step t, by group, action and automaton state.

        Args:
            t: the step. ending: (..., V, S) of actions that end the episode.
            after: (..., G, K, S) of the states that the others lead to; None where all end.

        Returns:
            (..., G or 1, V, S).
        """
        ending = ending.unsqueeze(-3)
        if after is None:
            return ending
        moved = self.law.after(after)
        return torch.where(self.ends(t), ending, moved.gather(-1, self.delta.expand(moved.shape)))

    def performance(self, contexts: Tensor, policy_logits: PolicyLogits | None = None) -> Performance:
        """What a policy earns, by backward recursion over all states.

        Args:
            contexts: (n,) in which responses start. policy_logits: the policy; None is the reference.
        """
        task, zero = self.task, torch.zeros_like(self.payments)
        # Return, the discount that the last reward will have, score, KL.
        endings = torch.stack([self.payments, zero + 1.0, self.payments, zero])
        discounts = torch.tensor([task.gamma, task.gamma, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
        tables: Tensor | None = None
        for t in reversed(range(self.horizon)):
            q = self.follow(t, endings, None if tables is None else discounts * tables).clone()
            # Token payments are collected into the score, and so is the KL where it is not dense: paid with the last.
            by_end = q[1]
            q[0] += self.token_payments * by_end
            q[2] += self.token_payments
            if policy_logits is None:
                tables = self.law.mean(q)
            else:
                priced = -task.kl_coef * (torch.ones_like(by_end) if task.dense_kl else by_end)
                tables = self._means(t, q, priced, policy_logits)
        assert tables is not None
        group, place = self.law.place(contexts)
        returns, _, score, kl = tables[:, group, place, self.automaton.initial]
        return Performance(returns, kl, score)

    def best_response(self, contexts: Tensor) -> Tensor:
        """(n,) float64: max over y of J(y), what a policy earns that gives one response for certain; log pi is then 0.

        By the recursion of V* with the largest of its terms in the place of their sum. Where a late KL is discounted,
        the largest sum of each length is sought apart, T times the work.

        Args:
            contexts: (n,) in which responses start.

        Raises:
            InvalidArgumentError: for token payments at gamma < 1 with a dense KL, and where more than some 10^8 sums
                would have to be compared.
        """
        task, late = self.task, is_late(self.task)
        sweeps = (self.horizon + 1) / 2 if late else 1
        entries = math.prod(self.law.shape) * self.law.vocab_size * self.num_states * self.horizon * sweeps
        if entries > _MOST:
            raise InvalidArgumentError(f"`task` must have at most {_MOST:.0e} sums to compare, got {entries:.0e}.")
        if task.dense_kl and task.gamma < 1 and self.pays_tokens:
            raise InvalidArgumentError(f"`gamma` must be 1 where an automaton pays for tokens, got {task.gamma!r}.")
        discount = task.gamma if task.dense_kl else 1.0
        group, place = self.law.place(contexts)
        found = []
        for last in range(self.horizon) if late else (None,):
            tables: Tensor | None = None
            for t in reversed(range(self.horizon if last is None else last + 1)):
                allowed = last is None or t == last
                ending = torch.where(self.ends(t) & allowed, self.payments, -torch.inf)
                tables = self._largest(self.follow(t, ending, None if tables is None else discount * tables))
            assert tables is not None
            sums = tables[group, place, self.automaton.initial]
            found.append(sums if last is None else torch.where(sums.isinf(), sums, task.gamma**last * sums))
        return torch.stack(found).amax(0)

    def _largest(self, q: Tensor) -> Tensor:
        """(G, K, S) max over actions of kl_coef log pi_ref + q, with q (G or 1, V, S) and the token payments."""
        q = q + self.token_payments
        groups, size = self.law.shape
        tables = torch.empty((groups, size, self.num_states), dtype=torch.float64)
        for group in range(groups):
            for places in torch.arange(size).split(max(_ENTRIES // q[0].numel(), 1)):
                log_ref = self.law.probs(self.law.context(group, places)).log()
                priced = (self.task.kl_coef * log_ref).masked_fill(~self.law.legal, -torch.inf)
                tables[group, places] = (priced.unsqueeze(-1) + q[min(group, len(q) - 1)]).amax(1)
        return tables

    def _means(self, t: int, q: Tensor, priced: Tensor, policy_logits: PolicyLogits) -> Tensor:
        """(4, G, K, S) expectations of q (4, G or 1, V, S) under a policy, the KL of this step included."""
        tables = torch.zeros((4, *self.law.shape, self.num_states), dtype=torch.float64)
        last = q.shape[1] - 1
        for group, places, state, log_probs, log_ref in self._laws(t, policy_logits):
            probs = log_probs.exp()
            log_ratio = torch.where(probs > 0, log_probs - log_ref, 0.0)
            g = min(group, last)
            tables[:, group, places, state] = (probs @ q[:, g, :, state].T).T
            tables[0, group, places, state] += (probs * log_ratio) @ priced[g, :, state]
            tables[3, group, places, state] += (probs * log_ratio).sum(-1)
        return tables

    def _laws(self, t: int, policy_logits: PolicyLogits) -> Iterator[tuple[int, Tensor, int, Tensor, Tensor]]:
        """Group, places (n,), automaton state, (n, V) log pi and (n, V) log pi_ref at step t, over all states."""
        groups, size = self.law.shape
        for group in range(groups):
            for places in torch.arange(size).split(max(_ENTRIES // self.law.vocab_size, 1)):
                contexts = self.law.context(group, places)
                log_ref = self.law.probs(contexts).log()
                for state in range(self.num_states):
                    logits = policy_logits(t, contexts, torch.full_like(places, state)).double()
                    log_probs = logits.masked_fill(~self.law.legal, -torch.inf).log_softmax(-1)
                    yield group, places, state, log_probs, log_ref

    def score_distribution(self, contexts: Tensor, policy_logits: PolicyLogits | None = None) -> tuple[Tensor, Tensor]:
        """How often a policy is paid how much: by carrying its probability forward.

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
        mass = torch.zeros((len(contexts), *self.law.shape, self.num_states), dtype=torch.float64)
        group, place = self.law.place(contexts)
        mass[torch.arange(len(contexts)), group, place, self.automaton.initial] = 1.0
        for t in range(self.horizon):
            if policy_logits is None:
                taken = mass
                for factor in reversed(self.law.transposed()):
                    taken = factor @ taken
            else:
                taken = mass.new_zeros((*mass.shape[:2], *self.delta.shape))
                for g, places, state, log_probs, _ in self._laws(t, policy_logits):
                    taken[:, g, :, state] += mass[:, g, places, state] @ log_probs.exp()
            ended = torch.where(self.ends(t), taken, 0.0).sum(1).flatten(1)
            result.index_add_(1, outcome.flatten(), ended)
            going = torch.where(self.ends(t), 0.0, taken)
            moved = torch.zeros_like(going).scatter_add_(-1, self.delta.expand(going.shape), going)
            mass = self.law.arrived(moved, 0.0, lambda x: x.sum(-2))
        return scores, result

    def log_length_weights(self, context: int) -> Tensor:
        """(T,) log sum over responses y of n tokens, n = 1 ... T, of pi_ref(y) exp(score(y) / kl_coef)."""
        price, law = self.task.kl_coef, self.law
        mass = torch.full((*law.shape, self.num_states), -torch.inf, dtype=torch.float64)
        group, place = law.place(torch.tensor(context))
        mass[group, place, self.automaton.initial] = 0.0
        result = torch.zeros(self.horizon, dtype=torch.float64)
        for t in range(self.horizon):
            taken = log_matmul(law.transposed(), mass) + self.token_payments / price
            result[t] = torch.where(self.ends(t), taken + self.payments / price, -torch.inf).flatten().logsumexp(0)
            going = taken.masked_fill(self.ends(t), -torch.inf)
            mass = law.arrived(_log_scatter(going, self.delta), -torch.inf, lambda x: x.logsumexp(-2))
        return result


def _log_scatter(log_x: Tensor, index: Tensor) -> Tensor:
    """log of exp(log_x) (..., V, S) added up along the last dimension at the places in index (V, S)."""
    index = index.expand(log_x.shape)
    top = torch.full_like(log_x, -torch.inf).scatter_reduce_(-1, index, log_x, "amax")
    shift = torch.where(top == -torch.inf, 0.0, top)
    total = torch.zeros_like(log_x).scatter_add_(-1, index, (log_x - shift.gather(-1, index)).exp())
    return total.log() + shift


class AutomatonSolution:
    """V* and pi* of an `AutomatonMDP`.

    `dense_kl=False` at gamma < 1 pays the whole KL with the discount d_n = gamma^(n-1) of the last reward, and

        pi*(y) = pi_ref(y) exp(score / b - 1 - lam / (b d_n)),    V*(x) = lam + b E_{pi*} d_n,    b = kl_coef

    with lam the root of sum_y pi*(y) = 1. What depends on n alone is a payment at the end, and the recursion is the one
    at gamma = 1. As lam depends on the prompt, such a solution holds for one start.

    Args:
        mdp: what is solved. contexts: (n,) in which the responses to its prompts start.
        prompts: (n,) the places of these prompts in their split; -1 of one from elsewhere.

    Attributes:
        mdp, contexts, prompts: as given.

    Raises:
        InvalidArgumentError: for token payments at gamma < 1 with a dense KL.
    """

    def __init__(self, mdp: AutomatonMDP, contexts: Tensor, prompts: Tensor) -> None:
        self.mdp, self.contexts, self.prompts = mdp, contexts, prompts
        task, horizon = mdp.task, mdp.horizon
        if task.dense_kl and task.gamma < 1 and mdp.pays_tokens:
            raise InvalidArgumentError(
                f"`gamma` must be 1 where an automaton pays for tokens, got {task.gamma!r}: they are paid at the end, "
                "so their sum would have to be part of the state. `solve_tree` takes small tasks."
            )
        self._discount = task.gamma if task.dense_kl else 1.0
        self._steps = torch.zeros(horizon, dtype=torch.float64)  # what one token more adds to the payment for length
        self._multiplier: float | None = None
        if is_late(task):
            self._discounts = (task.gamma ** torch.arange(horizon, dtype=torch.float64)).clamp(min=_LEAST)
            log_weights = mdp.log_length_weights(int(contexts[0]))
            self._multiplier = length_multiplier(log_weights, self._discounts, task.kl_coef)
            self._steps[:-1] = self._multiplier * (1 / self._discounts[:-1] - 1 / self._discounts[1:])
        shape = (horizon, *mdp.law.shape, mdp.num_states)
        self._tables = torch.empty(shape, dtype=torch.float64)  # V*; of a late solution less the payment for t tokens
        for t in reversed(range(horizon)):
            self._tables[t] = task.kl_coef * log_matmul(mdp.law.factors, self._q(t) / task.kl_coef)
        if self._multiplier is not None:
            self._log_discounts = self._expected_discounts()

    def _q(self, t: int) -> Tensor:
        """(G or 1, V, S) Q* at step t; -inf for ids that are no actions."""
        mdp = self.mdp
        after = None if t == mdp.horizon - 1 else self._discount * self._tables[t + 1] + self._steps[t]
        q = mdp.token_payments + mdp.follow(t, mdp.payments, after)
        return torch.where(mdp.law.legal[:, None], q, -torch.inf)

    def _expected_discounts(self) -> Tensor:
        """(T, G, K, S) log E_{pi*} gamma^(n-1-t): what the last reward is discounted by, seen from each state."""
        mdp, result = self.mdp, torch.empty_like(self._tables)
        price, log_gamma = mdp.task.kl_coef, math.log(mdp.task.gamma) if mdp.task.gamma else -math.inf
        for t in reversed(range(mdp.horizon)):
            after = None if t == mdp.horizon - 1 else result[t + 1] + log_gamma
            discounted = self._q(t) / price + mdp.follow(t, torch.zeros_like(mdp.payments), after)
            result[t] = log_matmul(mdp.law.factors, discounted) - self._tables[t] / price
        return result

    @property
    def values(self) -> Tensor:
        """(T, C, S) float64: V*(t, context, state) without token payments collected before, in the model's order of C.

        Raises:
            InvalidArgumentError: with `dense_kl=False` at gamma < 1, where the recursion has other numbers.
        """
        if self._multiplier is not None:
            raise InvalidArgumentError("`gamma` must be 1 for the table of V* where `dense_kl` is False.")
        tables = self._tables.transpose(1, 2) if self.mdp.law.order == 2 else self._tables
        return tables.flatten(1, 2)

    def value(self, t: int, contexts: Tensor, states: Tensor) -> Tensor:
        """(n,) V* at step t of contexts (n,) and automaton states (n,), without token payments collected before.

        With `dense_kl=False` at gamma < 1: the expected discounted return from there on, which includes all of the KL
        that the tokens before still owe; under pi* that depends on the state alone.
        """
        place = (*self.mdp.law.place(contexts), states)
        if self._multiplier is None:
            return self._tables[t][place]
        kl_coef = self.mdp.task.kl_coef
        return self._multiplier / self._discounts[t] + kl_coef * self._log_discounts[t][place].exp()

    def q(self, t: int, contexts: Tensor, states: Tensor) -> Tensor:
        """(n, V) Q* at step t of contexts (n,) and automaton states (n,), as `value`; -inf for ids that are no actions.

        With `dense_kl=False` at gamma < 1 they are those of the recursion: right up to a constant a row.
        """
        q = self._q(t)
        return q[self.mdp.law.place(contexts)[0].clamp(max=len(q) - 1), :, states]

    def log_policy(self, t: int, contexts: Tensor, states: Tensor) -> Tensor:
        """(n, V) log pi* at step t of contexts (n,) and automaton states (n,), in nats."""
        weights = self.q(t, contexts, states) / self.mdp.task.kl_coef
        return (self.mdp.law.probs(contexts).log() + weights).log_softmax(-1)

    def roots(self, contexts: Tensor | None = None) -> Tensor:
        """(n,) V*(x) of responses that start in contexts (n,); in those of its prompts if None."""
        contexts = self.contexts if contexts is None else contexts
        return self.value(0, contexts, torch.full_like(contexts, self.mdp.automaton.initial))

    def evaluate(self, policy_logits: PolicyLogits | None = None) -> Performance:
        """What a policy earns on the prompts, exactly; None is the reference, `log_policy` the optimum."""
        return self.mdp.performance(self.contexts, policy_logits)

    def score_distribution(self, policy_logits: PolicyLogits | None = None) -> tuple[Tensor, Tensor]:
        """(k,) scores and (n, k) how often a policy gets them on the prompts; see `AutomatonMDP.score_distribution`."""
        return self.mdp.score_distribution(self.contexts, policy_logits)


def is_late(task: Task) -> bool:
    """Whether the KL is paid with a last reward that is discounted: no backup over single steps is the optimum then."""
    return task.gamma < 1 and not task.dense_kl


def length_multiplier(log_weights: Tensor, discounts: Tensor, kl_coef: float) -> float:
    """The root lam of sum_n Z_n exp(-1 - lam / (b d_n)) = 1, by bisection to the last bit.

    The sum falls with lam, at least by the factor exp(-lam / b) as d <= 1: at lam = b log(sum at 0) it is on the other
    side of 1 than at 0.

    Args:
        log_weights: (T,) log Z_n, -inf for none. discounts: (T,) d_n in (0, 1]. kl_coef: b.

    Returns:
        lam, in units of the score.
    """

    def excess(lam: float) -> float:
        return float((log_weights - 1 - lam / (kl_coef * discounts)).logsumexp(0))

    edge = kl_coef * excess(0.0)
    low, high = min(edge, 0.0), max(edge, 0.0)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


class AutomatonPolicy:
    """pi*, for any prompt: an automaton that is not among those solved before is solved when it is met.

    Args:
        task: whose kl_coef, gamma, ... are the ones wanted.
        prompts: X prompts to solve for now, as token ids.

    Attributes:
        task, law: the task and its reference.
        solutions: one for each distinct automaton (and for each start, where the solution depends on it).

    Raises:
        InvalidArgumentError: for a reference or a reward that this solver does not know.
    """

    def __init__(self, task: Task, prompts: Sequence[Sequence[int]] = ()) -> None:
        check_solvable(task)
        lm, reward = task.reference("cpu"), expected_reward(task)
        if not isinstance(reward, AutomatonReward):
            raise InvalidArgumentError(
                f"`reward` must be an AutomatonReward for this solver, got {type(reward).__name__}."
            )
        self.task: Task = task
        self.law: MarkovLaw = MarkovLaw(lm)
        self.solutions: list[AutomatonSolution] = []
        self._reward: AutomatonReward = reward
        self._end_rule = task.end_rule(lm)
        self._numbers: dict[tuple[int, int], int] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for i, ids in enumerate(prompts):
            groups.setdefault(self._key(ids), []).append(i)
        for rows in groups.values():
            self._solve([prompts[i] for i in rows], rows)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self._end_rule.is_eos.device

    def _key(self, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """What prompts with one solution have in common."""
        start = self.law.first_context(prompt_ids) if is_late(self.task) else -1
        return id(self._reward.for_prompt(prompt_ids)), start

    def _solve(self, prompts: Sequence[Sequence[int]], places: list[int]) -> None:
        """Adds the solution of prompts with one key, which stand in these places of their split."""
        contexts, mdp = self._mdp(prompts)
        self._numbers[self._key(prompts[0])] = len(self.solutions)
        self.solutions.append(AutomatonSolution(mdp, contexts, torch.tensor(places)))

    def _mdp(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, AutomatonMDP]:
        """The contexts (n,) in which prompts with one automaton start, and their MDP."""
        contexts = torch.tensor([self.law.first_context(ids) for ids in prompts])
        return contexts, AutomatonMDP(self.law, self._reward.for_prompt(prompts[0]), self.task, self._end_rule)

    def best_responses(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(X,) float64 max over y of J(y|x), by one recursion for each distinct automaton (`AutomatonMDP`)."""
        groups: dict[int, list[int]] = {}
        for i, ids in enumerate(prompts):
            groups.setdefault(id(self._reward.for_prompt(ids)), []).append(i)
        values = torch.empty(len(prompts), dtype=torch.float64)
        for rows in groups.values():
            contexts, mdp = self._mdp([prompts[i] for i in rows])
            values[rows] = mdp.best_response(contexts)
        return values

    def number(self, prompt_ids: Sequence[int]) -> int:
        """The place in `solutions` of the one that holds for a prompt."""
        if self._key(prompt_ids) not in self._numbers:
            self._solve([prompt_ids], [-1])
        return self._numbers[self._key(prompt_ids)]

    def state_logits(self, prompt_ids: Sequence[int], automaton: Automaton) -> PolicyLogits | None:
        """log pi* of a prompt as a function of the state; None for an automaton that it is not the optimum of."""
        solution = self.solutions[self.number(prompt_ids)]
        return solution.log_policy if solution.mdp.automaton.equals(automaton) else None

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> AutomatonState:
        """Reads prompts (B, P), left-padded.

        Raises:
            InvalidArgumentError: for more tokens than the horizon that was solved.
        """
        if max_new_tokens > self.task.max_new_tokens:
            raise InvalidArgumentError(
                f"`max_new_tokens` must be at most {self.task.max_new_tokens}, got {max_new_tokens}."
            )
        state = AutomatonState(self, len(prompt_ids))
        state.begin(torch.arange(len(prompt_ids)), prompt_ids, prompt_mask)
        return state


class AutomatonState:
    """B running responses of an `AutomatonPolicy`; behind its end a row reads on, and nothing it says then counts."""

    def __init__(self, policy: AutomatonPolicy, rows: int) -> None:
        self._policy = policy
        # By row: number of the solution, step, context, automaton state; then token payments collected, and V*(x).
        self._ints = torch.zeros((4, rows), dtype=torch.int64)
        self._floats = torch.zeros((2, rows), dtype=torch.float64)
        self._read: tuple[Tensor, Tensor] | None = None

    @property
    def logits(self) -> Tensor:
        """(B, V) float64 log pi*."""
        return self._here()[0]

    @property
    def values(self) -> Tensor:
        """(B,) float64 V*(s), the expected discounted return from s on; what was collected before s is in it."""
        return self._here()[1]

    def _here(self) -> tuple[Tensor, Tensor]:
        if self._read is None:
            rows = self._ints.shape[1]
            logits = torch.zeros((rows, self._policy.law.vocab_size), dtype=torch.float64)
            values = torch.zeros(rows, dtype=torch.float64)
            task = self._policy.task
            for solution, t, here in self._alike():
                _, _, contexts, states = self._ints[:, here]
                logits[here] = solution.log_policy(t, contexts, states)
                if task.dense_kl or task.gamma < 1:
                    values[here] = solution.value(t, contexts, states)
            if task.dense_kl:
                values += self._floats[0]
            elif task.gamma == 1:  # score less the price of the whole KL: V*(x) for every response that pi* gives
                values = self._floats[1].clone()
            self._read = logits, values
        return self._read

    def _alike(self) -> Iterator[tuple[AutomatonSolution, int, Tensor]]:
        """Solution, step and row numbers (n,) of the rows that share both."""
        pairs, group = self._ints[:2].unique(dim=1, return_inverse=True)
        for i, (number, t) in enumerate(pairs.T.tolist()):
            yield self._policy.solutions[number], t, (group == i).nonzero().flatten()

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        policy = self._policy
        for row, ids, mask in zip(rows.tolist(), prompt_ids, prompt_mask.bool(), strict=True):
            prompt = ids[mask].tolist()
            number, context = policy.number(prompt), policy.law.first_context(prompt)
            solution = policy.solutions[number]
            self._ints[:, row] = torch.tensor([number, 0, context, solution.mdp.automaton.initial])
            self._floats[0, row], self._floats[1, row] = 0.0, solution.roots(torch.tensor([context]))[0]
        self._read = None

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        after, collected = self._ints.clone(), self._floats[0]
        for solution, t, here in self._alike():
            states, chosen = self._ints[3, here], tokens[here]
            collected[here] += solution.mdp.token_payments[chosen, states]
            after[3, here] = solution.mdp.delta[chosen, states]
            after[1, here] = min(t + 1, solution.mdp.horizon - 1)
        after[2] = self._policy.law.following(self._ints[2], tokens)
        self._ints, self._read = after, None

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._ints, self._floats, self._read = self._ints[:, rows], self._floats[:, rows], None


def solve_automaton(task: Task, split: str = "test") -> Optimum:
    """The optimum of a task whose reference is a `MarkovLM` and whose reward is an `AutomatonReward`, noisy or not.

    Time grows with T * C * V * S (a low rank R: T * R * (C + V) * S), memory with T * C * S; each distinct automaton is
    solved once.

    Args:
        task: whose kl_coef, gamma, ... are the ones wanted.
        split: which of its prompts.

    Returns:
        `Optimum` with an `AutomatonPolicy`.

    Raises:
        InvalidArgumentError: at `kl_coef=0`, for another reference or reward, and for token payments at gamma < 1 with
            a dense KL.
    """
    check_split(task, split)
    prompts = task.reference("cpu").encode_all(tuple(task.prompts[split]))
    policy = AutomatonPolicy(task, prompts)
    values, references = torch.zeros((2, len(prompts)), dtype=torch.float64)
    for solution in policy.solutions:
        values[solution.prompts] = solution.roots()
        references[solution.prompts] = solution.evaluate().returns
    return Optimum.solved("automaton", values, references, policy)
