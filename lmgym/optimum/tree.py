"""Every response of a task with a tiny vocabulary, and with them the optimum, J and its gradient, all exact.

Shapes: X prompts, R responses of all prompts together, T response columns, V vocabulary, A legal tokens, and N_t the
prefixes of t tokens of one prompt. The tree has the same shape for every prompt. The R / X responses of a prompt are
ordered by their length, then by their prefix, then by their last token; the children of a prefix are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LmGymError, check_int
from lmgym.models.causal import CausalLM
from lmgym.models.padding import pack
from lmgym.models.policy import Policy
from lmgym.optimum.answer import Optimum, check_repeatable, check_solvable, expected_reward
from lmgym.optimum.lengths import discounts_by_length, length_multiplier
from lmgym.rewards.base import RewardFunction, bind_tokenizer, remove_noise, score
from lmgym.tasks.base import Task, check_split

Law = Callable[[Episodes], Tensor]

_LOGITS = 2**22  # logits that a law is asked for at once, the prompt's columns counted as well
_ROWS = 4096  # responses that a law, or a reward, is asked for at once
_REPEATED = 1024  # responses that are scored a second time, for a reward that is noise
_MASS = 1e-6  # nats by which the legal tokens may miss a probability of 1


def law_of(model: CausalLM | Policy) -> Law:
    """The law of a model, as `Tree.evaluate` asks for it: (n, V) logits at every chosen token of episodes.

    Of a `CausalLM` by one teacher-forced forward, differentiable; of any other `Policy` by stepping it along.
    """
    return partial(_read_logits, model) if isinstance(model, CausalLM) else partial(_step_logits, model)


def _read_logits(lm: CausalLM, episodes: Episodes) -> Tensor:
    packed = pack(episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, episodes.response_mask)
    ids, rows, columns, _ = (x.to(lm.device) for x in packed)
    return lm.response_hidden(ids, rows, columns)[1]


def _step_logits(policy: Policy, episodes: Episodes) -> Tensor:
    episodes = episodes.to(policy.device)
    horizon = episodes.response_ids.shape[1]
    state = policy.begin(episodes.prompt_ids, episodes.prompt_mask, horizon)
    logits = [state.logits]
    for t in range(horizon - 1):
        state.step(episodes.response_ids[:, t])
        logits.append(state.logits)
    return torch.stack(logits, dim=1)[episodes.response_mask]


def count_responses(task: Task, lm: CausalLM) -> int:
    """How many responses there are to a prompt of a task with such a reference."""
    return _levels(task, lm)[-1].responses.stop


def solve_tree(task: Task, split: str = "test", limit: int = 2_000_000) -> Optimum:
    """The optimum of a task by enumeration: `Tree.of(task, split, limit).solve()`."""
    check_solvable(task)
    return Tree.of(task, split, limit).solve()


class Level(NamedTuple):
    """The prefixes of t tokens, of each prompt.

    Attributes:
        nodes: N_t, how many.
        ending: (E,) places among the legal tokens of those that end the response here.
        going: (A - E,) places of those that lead on, to the prefixes of t + 1 tokens.
        start: place, among the responses of a prompt, of the first that ends here.
    """

    nodes: int
    ending: Tensor
    going: Tensor
    start: int

    @property
    def responses(self) -> slice:
        """Those of a prompt that end here."""
        return slice(self.start, self.start + self.nodes * len(self.ending))


@dataclass(frozen=True, eq=False)
class TreeEvaluation:
    """What a policy is worth, exactly.

    Attributes:
        returns: (X,) float64, J(pi | x) at the task's own `gamma`, `kl_coef` and `dense_kl`, in units of the score.
        kl: (X,) float64, KL(pi || pi_ref) over responses, nats an episode, not discounted.
        entropy: (X,) float64, of the law over responses, nats an episode.
        score: (X,) float64, the expected score as paid, not discounted.
        log_probs: (R,) float64 nats, of each response of `Tree.episodes` given its prompt.
        scores: (R,) float64, as paid.
    """

    returns: Tensor
    kl: Tensor
    entropy: Tensor
    score: Tensor
    log_probs: Tensor
    scores: Tensor

    @property
    def value(self) -> float:
        """J(pi), the mean over prompts."""
        return self.returns.mean().item()

    @property
    def metrics(self) -> dict[str, float]:
        """Means over prompts, named as in `lmgym.evaluation`, and `entropy`."""
        per_prompt = {"return": self.returns, "score": self.score, "kl": self.kl, "entropy": self.entropy}
        return {name: x.mean().item() for name, x in per_prompt.items()}

    @property
    def score_distribution(self) -> tuple[Tensor, Tensor]:
        """The K distinct scores, ascending, and the probability of each, the mean over prompts: both (K,) float64."""
        scores, place = self.scores.unique(return_inverse=True)
        probs = self.log_probs.exp() / len(self.returns)
        return scores, torch.zeros_like(scores).index_add(0, place, probs)


class Tree:
    """All responses of all prompts of a split. Built by `Tree.of`.

    Attributes:
        task: the task.
        prompts: the X prompts' token ids.
        legal: (A,) int64, the ids that are actions.
        levels: the prefixes by their number of tokens.
        episodes: the R responses, prompt by prompt, on the CPU; `log_probs` are the reference's as well.
        scores: (X, R / X) float64, as paid.
        reference: log pi_ref of the legal tokens behind every prefix, (X, N_t, A) float64 of each level.
    """

    def __init__(self, task: Task, lm: CausalLM, prompts: Sequence[Sequence[int]], levels: list[Level]) -> None:
        self.task, self.levels = task, levels
        self.prompts = [tuple(ids) for ids in prompts]
        self.vocab_size = lm.vocab_size
        self.legal = lm.legal_table.nonzero().squeeze(1)
        self.episodes = self._enumerate(lm)
        n = self.episodes.lengths[: self._responses]
        self._discounts = float(task.gamma) ** (n - 1).double()  # (R / X,) gamma^(n - 1)
        last = self.episodes.response_ids.gather(1, (self.episodes.lengths - 1).unsqueeze(1)).squeeze(1)
        missing = ~lm.eos_table[last]
        reward = bind_tokenizer(expected_reward(task), lm.tokenizer)
        every = torch.arange(len(self.episodes))
        scores = self._score(lm, reward, every)
        some = every[:: math.ceil(len(every) / _REPEATED)]
        check_repeatable(scores[some].tolist(), self._score(lm, reward, some).tolist())
        paid = scores - task.missing_eos_penalty * missing.double()
        self.scores = paid.view(len(self.prompts), -1)
        with torch.no_grad():
            self.reference = self._read(law_of(lm))
        log_probs = torch.stack([self._column(t) for t in range(task.max_new_tokens)], dim=-1).flatten(0, 1).float()
        gold = None if task.gold is None else self._score(lm, remove_noise(task.gold), every).float()
        self.episodes = replace(
            self.episodes, log_probs=log_probs, ref_log_probs=log_probs, scores=paid.float(), gold_scores=gold
        )

    @classmethod
    def of(cls, task: Task, split: str = "test", limit: int = 2_000_000) -> Tree:
        """Enumerates every complete response to every prompt of a split, and asks the reference and the reward.

        A response ends with an EOS from token `min_new_tokens` on, or with its T-th token. The reference reads each of
        the longest prefixes once, and every place of it tells of a shorter one. A noisy reward counts as expected.

        Args:
            task: the task.
            split: which of its prompts.
            limit: how many responses there may be, of all prompts together. Memory and time grow with them.

        Raises:
            InvalidArgumentError: if there are more; it says how many.
        """
        check_split(task, split)
        check_int("limit", limit, 1)
        lm = task.reference("cpu")
        prompts = lm.encode_all(tuple(task.prompts[split]))
        levels = _levels(task, lm)
        total = len(prompts) * levels[-1].responses.stop
        if total > limit:
            count = f"{total:,}" if total < 10**12 else f"about 10^{math.log10(total):.0f}"
            raise InvalidArgumentError(
                f"`limit` must be at least the number of responses, and {len(prompts)} prompts have {count} of at most "
                f"{task.max_new_tokens} tokens each; got {limit:,}."
            )
        return cls(task, lm, prompts, levels)

    @property
    def _responses(self) -> int:
        """R / X, the responses of a prompt."""
        return self.levels[-1].responses.stop

    def _enumerate(self, lm: CausalLM) -> Episodes:
        """The responses; log-probs and scores are still 0."""
        x, width, horizon = len(self.prompts), max(len(p) for p in self.prompts), self.task.max_new_tokens
        ids = torch.full((self._responses, horizon), lm.pad_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        prefixes = torch.zeros((1, 0), dtype=torch.int64)
        for t, level in enumerate(self.levels):
            ids[level.responses, : t + 1] = _children(prefixes, self.legal[level.ending])
            mask[level.responses, : t + 1] = True
            prefixes = _children(prefixes, self.legal[level.going])
        prompt_ids = torch.tensor([[lm.pad_token_id] * (width - len(p)) + list(p) for p in self.prompts])
        prompt_mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in self.prompts])
        index = torch.arange(x).repeat_interleave(self._responses)
        return Episodes(
            prompt_ids=prompt_ids[index],
            prompt_mask=prompt_mask[index],
            response_ids=ids.repeat(x, 1),
            response_mask=mask.repeat(x, 1),
            log_probs=torch.zeros(()).expand(len(index), horizon),
            ref_log_probs=torch.zeros(()).expand(len(index), horizon),
            scores=torch.zeros(()).expand(len(index)),
            values=None,
            terminated=torch.ones(len(index), dtype=torch.bool),
            prompt_index=index,
        )

    def _score(self, lm: CausalLM, reward: RewardFunction, of: Tensor) -> Tensor:
        """(n,) float64 of what a reward function says of responses (n,), in batches."""
        texts = self.task.texts_of(self.prompts, lm)
        scores: list[float] = []
        for rows in of.split(_ROWS):
            index = self.episodes.prompt_index[rows].tolist()
            prompts, ids = [texts[i] for i in index], [list(self.prompts[i]) for i in index]
            padded, lengths = self.episodes.response_ids[rows].tolist(), self.episodes.lengths[rows].tolist()
            responses = [tokens[:n] for tokens, n in zip(padded, lengths, strict=True)]
            completions = lm.completions(ids, responses)
            scores += score(reward, prompts, completions, prompt_ids=ids, completion_ids=responses)
        return torch.tensor(scores, dtype=torch.float64)

    # -- what a law says of every prefix ---------------------------------------------------------------------------

    def _chunks(self, law: Law) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Asks a law for one response through each of the longest prefixes; differentiable.

        Yields:
            the number of the first prefix of the chunk, counted through all prompts; the rows (c,) of `episodes` that
            go through them; and log pi (c, D, A) of the legal tokens at each of their D places, float64.
        """
        last, depth = self.levels[-1], len(self.levels)
        of_prompt = last.start + torch.arange(last.nodes) * len(last.ending)
        rows = (torch.arange(len(self.prompts)).unsqueeze(1) * self._responses + of_prompt).flatten()
        width = self.episodes.prompt_ids.shape[1] + depth
        size = min(max(_LOGITS // (width * self.vocab_size), 1), _ROWS)
        for first in range(0, len(rows), size):
            chunk = rows[first : first + size]
            logits = law(self.episodes[chunk]).cpu().double()
            if logits.shape != (len(chunk) * depth, self.vocab_size):
                raise InvalidArgumentError(
                    "`law` must give one row of logits for each chosen token, of shape "
                    f"{(len(chunk) * depth, self.vocab_size)}, got {tuple(logits.shape)}."
                )
            log_probs = logits.log_softmax(-1)[:, self.legal]
            missed = log_probs.detach().logsumexp(-1).abs().max().item()
            if not missed <= _MASS:
                raise LmGymError(
                    "The probabilities that `law` gives to the responses must sum to 1, and those of the legal tokens "
                    f"miss it by {missed:.3g} nats at some place: there is mass on ids that are no token, or no law."
                )
            yield first, chunk, log_probs.view(len(chunk), depth, -1)

    def _first_readings(self, first: int, count: int) -> Iterator[tuple[Level, slice, slice]]:
        """Of each level: which of `count` longest prefixes from number `first` on are the first behind a prefix there.

        Yields:
            the level, the slice of the chunk, and the slice of the X * N_t prefixes of the level.
        """
        for level in self.levels:
            stride = self.levels[-1].nodes // level.nodes
            skip = -first % stride
            begin = (first + skip) // stride
            yield level, slice(skip, None, stride), slice(begin, begin + len(range(skip, count, stride)))

    def _read(self, law: Law) -> list[Tensor]:
        """log pi of the legal tokens behind every prefix: (X, N_t, A) float64 of each level."""
        x, a = len(self.prompts), len(self.legal)
        result = [torch.empty((x * level.nodes, a), dtype=torch.float64) for level in self.levels]
        for first, rows, log_probs in self._chunks(law):
            for t, (_, here, nodes) in enumerate(self._first_readings(first, len(rows))):
                result[t][nodes] = log_probs[here, t]
        return [level.view(x, -1, a) for level in result]

    def _total(self, numbers: Sequence[Tensor], rate: float = 1.0) -> Tensor:
        """(X, R / X): sum_t rate^t * number(s_t, a_t) of every response, of (X, N_t, A) numbers of each level."""
        before, parts = torch.zeros((len(self.prompts), 1), dtype=torch.float64), []
        for t, level in enumerate(self.levels):
            so_far = before.unsqueeze(-1) + rate**t * numbers[t]
            parts.append(so_far[..., level.ending].flatten(1))
            before = so_far[..., level.going].flatten(1)
        return torch.cat(parts, dim=1)

    def _column(self, t: int) -> Tensor:
        """(X, R / X): log pi_ref of the t-th token of every response, 0 where it has none."""
        return self._total([x if k == t else torch.zeros_like(x) for k, x in enumerate(self.reference)])

    def _actions(self, t: int, at_end: Tensor, behind: Tensor) -> Tensor:
        """(X, N_t, A) from numbers of the responses (X, R / X) and of the prefixes one longer (X, N_(t+1))."""
        level, x = self.levels[t], len(self.prompts)
        result = torch.empty((x, level.nodes, len(self.legal)), dtype=torch.float64)
        result[..., level.ending] = at_end[:, level.responses].view(x, level.nodes, -1)
        result[..., level.going] = behind.view(x, level.nodes, -1)
        return result

    # -- the optimum -----------------------------------------------------------------------------------------------

    def solve(self) -> Optimum:
        """V* and pi*, for any gamma in [0, 1], by one sweep from the last tokens to the first, in float64.

        `dense_kl=True`: soft Q-iteration (Haarnoja et al. 2017, eq. 8 and 9, with pi_ref in place of the uniform law)
        for the reward of Ziegler et al. (2019, eq. 2), at temperature beta = kl_coef,

            V(s) = beta log sum_a pi_ref(a|s) exp(Q(s, a) / beta),    Q = score if a ends the response, else gamma V(s')
            pi*(a|s) = pi_ref(a|s) exp((Q(s, a) - V(s)) / beta)

        which at gamma = 1 is V*(x) = beta log E_{pi_ref} exp(score / beta) (Korbak et al. 2022).

        `dense_kl=False`: the whole KL is paid with the score, with d = gamma^(n-1) for a response of n tokens,

            J = E d (score - beta log pi(y) / pi_ref(y))

        which is concave in the law over responses, and its Lagrangian is stationary at

            pi*(y) = pi_ref(y) exp(score / beta - 1 - lam / (beta d)),    V*(x) = lam + beta E_{pi*} d

        with lam the root of sum_y pi*(y) = 1. The factor that depends on n alone is a terminal payment in the recursion
        at gamma = 1.

        Returns:
            `Optimum` with its policy, whose values V*(s) are the expected discounted return from s on under pi*; at
            `dense_kl=False` that includes what the tokens before s still owe.

        Raises:
            InvalidArgumentError: at `kl_coef=0`.
        """
        check_solvable(self.task)
        log_probs, values = self._solve_dense() if self.task.dense_kl else self._solve_late()
        references = (self._total(self.reference).exp() * self._discounts * self.scores).sum(1)
        policy = TreePolicy(self, log_probs, values)
        return Optimum.solved("tree", values[0].squeeze(1), references, policy)

    def best_response(self) -> Tensor:
        """(X,) float64: max over y of J(y|x), what a policy earns that gives one response for certain; log pi is 0."""
        return self._returns([-reference for reference in self.reference]).amax(1)

    def _solve_dense(self) -> tuple[list[Tensor], list[Tensor]]:
        """log pi* (X, N_t, A) and V* (X, N_t) of each level."""
        beta, gamma = self.task.kl_coef, self.task.gamma
        log_probs: list[Tensor] = []
        values = [torch.zeros((len(self.prompts), 0), dtype=torch.float64)]
        for t in reversed(range(len(self.levels))):
            q = self._actions(t, self.scores, gamma * values[0])
            values.insert(0, beta * (self.reference[t] + q / beta).logsumexp(-1))
            log_probs.insert(0, self.reference[t] + (q - values[0].unsqueeze(-1)) / beta)
        return log_probs, values[:-1]

    def _solve_late(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same where the KL is paid at the end, as a factor c_n = exp(-lam / (beta d_n)) on responses of n tokens.

        Sums below a prefix are kept relative to the factor of the shortest responses there, which may itself be far
        outside the range of floating-point numbers.
        """
        beta, depth, weights = self.task.kl_coef, len(self.levels), self.scores / self.task.kl_coef
        exponents = weights + self._total(self.reference)
        by_length = torch.stack([exponents[:, level.responses].logsumexp(1) for level in self.levels], dim=1)
        discounts = discounts_by_length(self.task.gamma, depth)
        lam = torch.tensor([length_multiplier(row, discounts, beta) for row in by_length], dtype=torch.float64)
        factors = -lam.unsqueeze(1) / (beta * discounts)  # (X, D) log c_n
        log_probs: list[Tensor] = []
        behind = torch.zeros((len(self.prompts), 0), dtype=torch.float64)
        for t in reversed(range(depth)):
            step = factors[:, t + 1 : t + 2] - factors[:, t : t + 1] if t + 1 < depth else 0.0
            terms = self.reference[t] + self._actions(t, weights, behind + step)
            behind = terms.logsumexp(-1)
            log_probs.insert(0, terms - behind.unsqueeze(-1))
        values = [behind[:, :0]]
        for t in reversed(range(depth)):
            # Under pi* the score less the price of the whole KL is the same for all responses of n tokens.
            paid = (beta + lam / discounts[t]).unsqueeze(1).expand_as(self.scores)
            returns = self._actions(t, paid, self.task.gamma * values[0])
            values.insert(0, (log_probs[t].exp() * returns).sum(-1))
        return log_probs, values[:-1]

    # -- any law ---------------------------------------------------------------------------------------------------

    def _returns(self, log_ratio: Sequence[Tensor]) -> Tensor:
        """(X, R / X): discounted return of every response, of (X, N_t, A) nats of log-ratio of each level."""
        task = self.task
        if task.kl_coef == 0:
            return self._discounts * self.scores
        if task.dense_kl:
            return self._discounts * self.scores - task.kl_coef * self._total(log_ratio, task.gamma)
        return self._discounts * (self.scores - task.kl_coef * self._total(log_ratio))

    @torch.no_grad()
    def evaluate(self, law: Law) -> TreeEvaluation:
        """J of a law, its KL, entropy and scores: sums over all responses, J(pi | x) = sum_y pi(y|x) sum_t gamma^t r_t.

        Args:
            law: gives (n, V) logits at every chosen token of the episodes it is handed, row by row of their mask
                (`law_of`); it is handed one response through each of the longest prefixes, in chunks.

        Raises:
            LmGymError: if the responses' probabilities do not sum to 1.
            InvalidArgumentError: if the law gives another shape.
        """
        levels = self._read(law)
        log_probs = self._total(levels)
        probs = log_probs.exp()
        log_ratio = [own - ref for own, ref in zip(levels, self.reference, strict=True)]

        def expect(numbers: Tensor) -> Tensor:  # what never happens may have any number
            return torch.where(probs > 0, probs * numbers, 0.0).sum(1)

        return TreeEvaluation(
            returns=expect(self._returns(log_ratio)),
            kl=expect(self._total(log_ratio)),
            entropy=expect(-log_probs),
            score=expect(self.scores),
            log_probs=log_probs.flatten(),
            scores=self.scores.flatten(),
        )

    def gradient(self, law: Law, parameters: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """J and its exact gradient, by autograd through J = 1/X sum_x sum_y pi(y|x) G(y) itself, chunk by chunk.

        G(y) = sum_t gamma^t r_t with both halves of the KL, and G depends on pi through them. With `dense_kl`, or at
        gamma = 1, that adds nothing, for E[grad log pi(a|s)] = 0 at every state, and the gradient is the plain
        E[G grad log pi(y)] (Williams 1992). A KL paid late at gamma < 1 adds -kl_coef E[gamma^(n-1) grad log pi(y)],
        which is not 0.

        Args:
            law: as in `evaluate`, differentiable. It is asked once for each chunk, and each graph is freed before the
                next is made.
            parameters: what J is differentiated by, of any float dtype.

        Returns:
            J, the mean over prompts; and the gradients, each with the shape and dtype of its parameter.

        Raises:
            LmGymError: if the responses' probabilities do not sum to 1.
            InvalidArgumentError: if the law gives another shape, or no graph.
        """
        task, depth = self.task, len(self.levels)
        fixed = self._returns([-x for x in self.reference])  # what the log-probs of the law are not part of
        place = torch.zeros(self.vocab_size, dtype=torch.int64)
        place[self.legal] = torch.arange(len(self.legal))
        discounts = task.gamma ** torch.arange(depth, dtype=torch.float64)
        value, gradients = 0.0, [torch.zeros_like(p) for p in parameters]
        for first, rows, log_probs in self._chunks(law):
            if not log_probs.requires_grad:
                raise InvalidArgumentError("`law` must be differentiable in `parameters`, and its logits are not.")
            tokens = place[self.episodes.response_ids[rows, :depth]].unsqueeze(-1)
            chosen = log_probs.gather(-1, tokens).squeeze(-1)[:, :-1]
            before = pad(chosen.cumsum(1), (1, 0)).unsqueeze(-1)  # (c, D, 1) log pi of the prefix at each place
            paid = pad((discounts[:-1] * chosen).cumsum(1), (1, 0)).unsqueeze(-1)
            total = torch.zeros((), dtype=torch.float64)
            for t, (level, here, nodes) in enumerate(self._first_readings(first, len(rows))):
                ends = log_probs[here, t][:, level.ending]
                log_prob = before[here, t] + ends
                priced = paid[here, t] + discounts[t] * ends if task.dense_kl else discounts[t] * log_prob
                rest = fixed[:, level.responses].reshape(len(self.prompts) * level.nodes, -1)[nodes]
                possible = log_prob > -torch.inf
                returns = rest[possible] - task.kl_coef * priced[possible]
                total = total + (log_prob[possible].exp() * returns).sum()
            total = total / len(self.prompts)
            value += total.item()
            parts = torch.autograd.grad(total, list(parameters), allow_unused=True)
            for gradient, part in zip(gradients, parts, strict=True):
                if part is not None:
                    gradient += part
        return value, gradients


class TreePolicy:
    """A policy written down for every prefix of a tree (`lmgym.models.policy.Policy`).

    Prefixes are numbered through all levels and prompts, so that rows of a batch may be at different places.

    Args:
        tree: the prompts and the shape.
        log_probs: (X, N_t, A) of each level, the law.
        values: (X, N_t) of each level, the expected return from there on.

    Attributes:
        log_probs: (S, A) float64 of all S prefixes of all prompts; any logits will do.
        values: (S,) float64.
    """

    def __init__(self, tree: Tree, log_probs: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.vocab_size, self.legal, self.horizon = tree.vocab_size, tree.legal, tree.task.max_new_tokens
        self.log_probs = torch.cat([x.flatten(0, 1) for x in log_probs])
        self.values = torch.cat([x.flatten() for x in values])
        self.roots = {ids: i for i, ids in enumerate(tree.prompts)}
        nodes = torch.tensor([0] + [len(tree.prompts) * level.nodes for level in tree.levels])
        self.starts = nodes.cumsum(0)  # number of the first prefix of each level
        self.branches = torch.tensor([len(level.going) for level in tree.levels])
        self.child = torch.full((len(tree.levels), tree.vocab_size), -1)  # which child a token leads to; -1 is none
        for t, level in enumerate(tree.levels):
            self.child[t, tree.legal[level.going]] = torch.arange(len(level.going))

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.log_probs.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> TreeState:
        """Finds prompts (B, P), left-padded, in the tree.

        Raises:
            InvalidArgumentError: for a prompt that is not in it, or more tokens than it has levels for.
        """
        if max_new_tokens > self.horizon:
            raise InvalidArgumentError(f"`max_new_tokens` must be at most {self.horizon}, got {max_new_tokens}.")
        state = TreeState(self, len(prompt_ids))
        state.begin(torch.arange(len(prompt_ids)), prompt_ids, prompt_mask)
        return state


class TreeState:
    """B running responses of a `TreePolicy`; behind the end of its response a row stays where it was."""

    def __init__(self, policy: TreePolicy, rows: int) -> None:
        self._policy = policy
        self._node = torch.zeros(rows, dtype=torch.int64)
        self._depth = torch.zeros(rows, dtype=torch.int64)

    @property
    def logits(self) -> Tensor:
        """(B, V) float64 log-probs of each response's next token."""
        logits = torch.full((len(self._node), self._policy.vocab_size), -torch.inf, dtype=torch.float64)
        logits[:, self._policy.legal] = self._policy.log_probs[self._node]
        return logits

    @property
    def values(self) -> Tensor:
        """(B,) float64, V(s)."""
        return self._policy.values[self._node]

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        found = []
        for ids, mask in zip(prompt_ids, prompt_mask.bool(), strict=True):
            prompt = tuple(ids[mask].tolist())
            if prompt not in self._policy.roots:
                raise InvalidArgumentError(f"`prompt_ids` must be a prompt of the tree, got {list(prompt)}.")
            found.append(self._policy.roots[prompt])
        self._node[rows], self._depth[rows] = torch.tensor(found), 0

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        policy, depth = self._policy, self._depth
        child = policy.child[depth, tokens]
        inside = (self._node - policy.starts[depth]) * policy.branches[depth] + child
        self._node = torch.where(child >= 0, policy.starts[depth + 1] + inside, self._node)
        self._depth = depth + (child >= 0)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._node, self._depth = self._node[rows], self._depth[rows]


def _levels(task: Task, lm: CausalLM) -> list[Level]:
    """The shape of the tree over the legal tokens: up to T levels, fewer where all must have ended."""
    legal, end_rule = lm.legal_table, task.end_rule(lm)
    levels: list[Level] = []
    nodes, start = 1, 0
    for t in range(task.max_new_tokens):
        ends = end_rule.find_ending_tokens(t)[legal]
        level = Level(nodes, ends.nonzero().squeeze(1), (~ends).nonzero().squeeze(1), start)
        levels.append(level)
        nodes, start = nodes * len(level.going), level.responses.stop
        if not nodes:
            break
    return levels


def _children(prefixes: Tensor, tokens: Tensor) -> Tensor:
    """(N * C, t + 1) from prefixes (N, t) and tokens (C,): those of a prefix one behind the other."""
    repeated = prefixes.repeat_interleave(len(tokens), dim=0)
    return torch.cat([repeated, tokens.repeat(len(prefixes)).unsqueeze(1)], dim=1)
