"""Every response of a task with a tiny vocabulary, and with them the optimum, J and its gradient, all exact.

Shapes: X prompts, R responses of all prompts together, T response columns, V vocabulary, A legal tokens, D levels, and
N_t the prefixes of t tokens of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lmgym.errors import InvalidArgumentError, check_int
from lmgym.models.causal import CausalLM
from lmgym.optimum.answer import Optimum, check_repeatable, check_solvable, expected_reward
from lmgym.optimum.lengths import discounts_by_length, length_multiplier
from lmgym.optimum.tree.evaluation import TreeEvaluation, TreeSolution
from lmgym.optimum.tree.logits import EpisodeLogits, make_episode_logits
from lmgym.optimum.tree.policy import TreePolicy
from lmgym.optimum.tree.responses import Responses
from lmgym.optimum.tree.shape import list_levels
from lmgym.rewards.base import bind_tokenizer, remove_noise
from lmgym.tasks.base import Task, check_split

_MAX_SCORED_TWICE = 1024  # responses that are scored once more, to notice a reward with noise


def solve_tree(task: Task, split: str = "test", limit: int = 2_000_000) -> Optimum:
    """The optimum of a task by enumeration: `Tree.of(task, split, limit).solve()`."""
    check_solvable(task)
    return Tree.of(task, split, limit).solve()


class Tree:
    """All responses of all prompts of a split, with their scores. Built by `Tree.of`.

    Attributes:
        task: the task.
        responses: all of them, and the shape of the tree.
        episodes: the R responses, prompt by prompt, on the CPU; `log_probs` are the reference's as well.
        scores: (X, R / X) float64, as paid.
        reference: log pi_ref of the legal tokens after every prefix, (X, N_t, A) float64 of each level.
    """

    def __init__(self, task: Task, lm: CausalLM, responses: Responses) -> None:
        self.task = task
        self.responses = responses
        episodes = responses.episodes
        n = episodes.lengths[: responses.per_prompt]
        self._discounts = float(task.gamma) ** (n - 1).double()  # (R / X,) gamma^(n - 1)
        last = episodes.response_ids.gather(1, (episodes.lengths - 1).unsqueeze(1)).squeeze(1)
        missing = ~lm.eos_table[last]
        reward = bind_tokenizer(expected_reward(task), lm.tokenizer)
        texts = task.texts_of(responses.prompts, lm)
        every = torch.arange(len(episodes))
        scores = responses.score(lm, reward, texts, every)
        some = every[:: math.ceil(len(every) / _MAX_SCORED_TWICE)]
        check_repeatable(scores[some].tolist(), responses.score(lm, reward, texts, some).tolist())
        paid = scores - task.missing_eos_penalty * missing.double()
        self.scores = paid.view(len(responses.prompts), -1)
        with torch.no_grad():
            self.reference = responses.read(make_episode_logits(lm))
        columns = [responses.pick_column(self.reference, t) for t in range(task.max_new_tokens)]
        log_probs = torch.stack(columns, dim=-1).flatten(0, 1).float()
        gold = None if task.gold is None else responses.score(lm, remove_noise(task.gold), texts, every).float()
        self.episodes = replace(
            episodes, log_probs=log_probs, ref_log_probs=log_probs, scores=paid.float(), gold_scores=gold
        )

    @classmethod
    def of(cls, task: Task, split: str = "test", limit: int = 2_000_000) -> Tree:
        """Enumerates every complete response to every prompt of a split, and asks the reference and the reward.

        A response ends with an EOS from token `min_new_tokens` on, or with its T-th token. A noisy reward counts as
        expected.

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
        levels = list_levels(task, lm)
        total = len(prompts) * levels[-1].responses.stop
        if total > limit:
            count = f"{total:,}" if total < 10**12 else f"about 10^{math.log10(total):.0f}"
            raise InvalidArgumentError(
                f"`limit` must be at least the number of responses, and {len(prompts)} prompts have {count} of at most "
                f"{task.max_new_tokens} tokens each; got {limit:,}."
            )
        return cls(task, lm, Responses(task, lm, prompts, levels))

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The X prompts' token ids."""
        return self.responses.prompts

    # -- the optimum -----------------------------------------------------------------------------------------------

    def solve(self) -> Optimum:
        """V* and pi*, for any gamma in [0, 1], by one sweep from the last tokens to the first, in float64.

        `dense_kl=True`: soft Q-iteration (Haarnoja et al. 2017, eq. 8 and 9, with pi_ref instead of a uniform policy)
        for the reward of Ziegler et al. (2019, eq. 2), at temperature beta = kl_coef,

            V(s) = beta log sum_a pi_ref(a|s) exp(Q(s, a) / beta),    Q = score if a ends the response, else gamma V(s')
            pi*(a|s) = pi_ref(a|s) exp((Q(s, a) - V(s)) / beta)

        which at gamma = 1 is V*(x) = beta log E_{pi_ref} exp(score / beta) (Korbak et al. 2022).

        `dense_kl=False`: the whole KL is paid with the score, with d = gamma^(n-1) for a response of n tokens,

            J = E d (score - beta log pi(y) / pi_ref(y))

        which is concave in the distribution over responses, and its Lagrangian is stationary at

            pi*(y) = pi_ref(y) exp(score / beta - 1 - lam / (beta d)),    V*(x) = lam + beta E_{pi*} d

        with lam the root of sum_y pi*(y) = 1. The factor in n alone is a payment at the end in the recursion at
        gamma = 1.

        Returns:
            `Optimum` with its policy, whose values V*(s) are the expected discounted return from s on under pi*; at
            `dense_kl=False` that includes the KL of the tokens before s, which is not paid yet.

        Raises:
            InvalidArgumentError: at `kl_coef=0`.
        """
        log_probs, values = self.solve_levels()
        references = (self.responses.add_up(self.reference).exp() * self._discounts * self.scores).sum(1)
        policy = TreePolicy(self.responses, log_probs, values)
        return Optimum.solved("tree", values[0].squeeze(1), references, policy)

    def solve_levels(self) -> TreeSolution:
        """What `solve` finds, prefix by prefix.

        Raises:
            InvalidArgumentError: at `kl_coef=0`.
        """
        check_solvable(self.task)
        return TreeSolution(*(self._solve_dense() if self.task.dense_kl else self._solve_late()))

    def best_response(self) -> Tensor:
        """(X,) float64: max over y of J(y|x), what a policy earns that gives one response for certain; log pi is 0."""
        return self._returns([-reference for reference in self.reference]).amax(1)

    def _solve_dense(self) -> tuple[list[Tensor], list[Tensor]]:
        """log pi* (X, N_t, A) and V* (X, N_t) of each level."""
        beta = self.task.kl_coef
        gamma = self.task.gamma
        log_probs: list[Tensor] = []
        values = [torch.zeros((len(self.prompts), 0), dtype=torch.float64)]
        for t in reversed(range(len(self.responses.levels))):
            q = self.responses.join_actions(t, self.scores, gamma * values[0])
            values.insert(0, beta * (self.reference[t] + q / beta).logsumexp(-1))
            log_probs.insert(0, self.reference[t] + (q - values[0].unsqueeze(-1)) / beta)
        return log_probs, values[:-1]

    def _solve_late(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same where the KL is paid at the end, as a factor c_n = exp(-lam / (beta d_n)) on responses of n tokens.

        Sums below a prefix are relative to the factor of the shortest responses there, because that factor may be far
        outside the range of floating-point numbers.
        """
        beta = self.task.kl_coef
        levels = self.responses.levels
        depth = len(levels)
        weights = self.scores / beta
        exponents = weights + self.responses.add_up(self.reference)
        by_length = torch.stack([exponents[:, level.responses].logsumexp(1) for level in levels], dim=1)
        discounts = discounts_by_length(self.task.gamma, depth)
        lam = torch.tensor([length_multiplier(row, discounts, beta) for row in by_length], dtype=torch.float64)
        factors = -lam.unsqueeze(1) / (beta * discounts)  # (X, D) log c_n
        log_probs: list[Tensor] = []
        after = torch.zeros((len(self.prompts), 0), dtype=torch.float64)
        for t in reversed(range(depth)):
            step = factors[:, t + 1 : t + 2] - factors[:, t : t + 1] if t + 1 < depth else 0.0
            terms = self.reference[t] + self.responses.join_actions(t, weights, after + step)
            after = terms.logsumexp(-1)
            log_probs.insert(0, terms - after.unsqueeze(-1))
        values = [after[:, :0]]
        for t in reversed(range(depth)):
            # Under pi* the score less the price of the whole KL is the same for all responses of n tokens.
            paid = (beta + lam / discounts[t]).unsqueeze(1).expand_as(self.scores)
            returns = self.responses.join_actions(t, paid, self.task.gamma * values[0])
            values.insert(0, (log_probs[t].exp() * returns).sum(-1))
        return log_probs, values[:-1]

    # -- any policy ------------------------------------------------------------------------------------------------

    def _returns(self, log_ratio: Sequence[Tensor]) -> Tensor:
        """(X, R / X): discounted return of every response, of (X, N_t, A) nats of log-ratio of each level."""
        task = self.task
        if task.kl_coef == 0:
            return self._discounts * self.scores
        if task.dense_kl:
            return self._discounts * self.scores - task.kl_coef * self.responses.add_up(log_ratio, task.gamma)
        return self._discounts * (self.scores - task.kl_coef * self.responses.add_up(log_ratio))

    @torch.no_grad()
    def evaluate(self, episode_logits: EpisodeLogits) -> TreeEvaluation:
        """J of a policy, its KL, entropy and scores, as sums over all responses.

        J(pi | x) = sum_y pi(y|x) sum_t gamma^t r_t.

        Args:
            episode_logits: the policy (`make_episode_logits`). It is called on chunks of responses, one through each of
                the longest prefixes.

        Raises:
            LmGymError: if the responses' probabilities do not sum to 1.
            InvalidArgumentError: for logits of another shape.
        """
        levels = self.responses.read(episode_logits)
        log_probs = self.responses.add_up(levels)
        probs = log_probs.exp()
        log_ratio = [own - ref for own, ref in zip(levels, self.reference, strict=True)]

        def expect(numbers: Tensor) -> Tensor:  # the number of an impossible response does not count, even if inf
            return torch.where(probs > 0, probs * numbers, 0.0).sum(1)

        return TreeEvaluation(
            returns=expect(self._returns(log_ratio)),
            kl=expect(self.responses.add_up(log_ratio)),
            entropy=expect(-log_probs),
            score=expect(self.scores),
            log_probs=log_probs.flatten(),
            scores=self.scores.flatten(),
        )

    def gradient(self, episode_logits: EpisodeLogits, parameters: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """J and its exact gradient, by autograd through J = 1/X sum_x sum_y pi(y|x) G(y) itself, chunk by chunk.

        G(y) = sum_t gamma^t r_t has both halves of the KL, and depends on pi through them. With `dense_kl`, or at
        gamma = 1, that adds nothing, because E[grad log pi(a|s)] = 0 at every state: the gradient is the plain
        E[G grad log pi(y)] (Williams 1992). A KL paid late at gamma < 1 adds -kl_coef E[gamma^(n-1) grad log pi(y)],
        which is not 0.

        Args:
            episode_logits: as in `evaluate`, differentiable. It is called once for each chunk, whose graph is freed
                before the next call.
            parameters: what J is differentiated by, of any float dtype.

        Returns:
            J, the mean over prompts; and the gradients, each with the shape and dtype of its parameter.

        Raises:
            LmGymError: if the responses' probabilities do not sum to 1.
            InvalidArgumentError: for logits of another shape, or without a graph.
        """
        fixed = self._returns([-x for x in self.reference])  # the part without the log-probs of the policy
        value = 0.0
        gradients = [torch.zeros_like(p) for p in parameters]
        for first, rows, log_probs in self.responses.read_chunks(episode_logits):
            if not log_probs.requires_grad:
                raise InvalidArgumentError("`episode_logits` must be differentiable in `parameters`, and is not.")
            share = self._share_of_value(first, rows, log_probs, fixed)
            value += share.item()
            parts = torch.autograd.grad(share, list(parameters), allow_unused=True)
            for gradient, part in zip(gradients, parts, strict=True):
                if part is not None:
                    gradient += part
        return value, gradients

    def _share_of_value(self, first: int, rows: Tensor, log_probs: Tensor, fixed: Tensor) -> Tensor:
        """What the responses of a chunk add to J; differentiable.

        Args:
            first, rows, log_probs: of the chunk, as `Responses.read_chunks` gives them.
            fixed: (X, R / X) the part of each return without the log-probs of the policy.
        """
        task = self.task
        responses = self.responses
        depth = len(responses.levels)
        discounts = task.gamma ** torch.arange(depth, dtype=torch.float64)
        index = torch.zeros(responses.vocab_size, dtype=torch.int64)
        index[responses.legal] = torch.arange(len(responses.legal))
        tokens = index[self.episodes.response_ids[rows, :depth]].unsqueeze(-1)
        chosen = log_probs.gather(-1, tokens).squeeze(-1)[:, :-1]
        before = pad(chosen.cumsum(1), (1, 0)).unsqueeze(-1)  # (c, D, 1) log pi of the prefix at each position
        paid = pad((discounts[:-1] * chosen).cumsum(1), (1, 0)).unsqueeze(-1)
        total = torch.zeros((), dtype=torch.float64)
        for t, (level, firsts, nodes) in enumerate(responses.find_first_rows(first, len(rows))):
            ends = log_probs[firsts, t][:, level.ending]
            log_prob = before[firsts, t] + ends
            priced = paid[firsts, t] + discounts[t] * ends if task.dense_kl else discounts[t] * log_prob
            rest = fixed[:, level.responses].reshape(len(self.prompts) * level.nodes, -1)[nodes]
            possible = log_prob > -torch.inf
            returns = rest[possible] - task.kl_coef * priced[possible]
            total = total + (log_prob[possible].exp() * returns).sum()
        return total / len(self.prompts)
