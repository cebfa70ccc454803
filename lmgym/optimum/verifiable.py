"""V* and pi* where the score is 1 for a known set of responses and 0 for all others: a closed form, for any reference.

With p(x) the reference's probability of the accepted responses and b = kl_coef, at gamma = 1

    V*(x) = b log E_{pi_ref} exp(score / b) = b log(1 + p(x) (exp(1 / b) - 1))

and likewise at every state, with p(s) the probability to finish in an accepted response from there.

Shapes: B rows, V vocabulary, Y accepted responses of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.models.padding import pad_right
from lmgym.models.policy import CausalPolicy, PolicyState
from lmgym.optimum.answer import Optimum, check_solvable, expected_reward
from lmgym.tasks.base import Task, check_split

AcceptedResponses = Callable[[Sequence[int]], Sequence[Sequence[int]]]


def log_exp_reward(log_probs: Tensor, kl_coef: float) -> Tensor:
    """log(1 + p (exp(1 / b) - 1)) = V / b of states with probabilities p of an accepted response, at any scale.

    Args:
        log_probs: (...) float64 log p, -inf allowed. kl_coef: b.
    """
    log_gain = 1 / kl_coef + math.log(-math.expm1(-1 / kl_coef))
    return torch.logaddexp(torch.zeros_like(log_probs), log_probs + log_gain)


@dataclass(eq=False)
class Prefix:
    """A prefix of accepted responses.

    Attributes:
        log_prob: nats, the reference's probability to finish in an accepted response from here.
        next: the prefixes one token longer.
    """

    log_prob: float = -math.inf
    next: dict[int, Prefix] = field(default_factory=dict)


_ELSEWHERE = Prefix()


def prefix_table(responses: Sequence[Sequence[int]], log_probs: Tensor) -> Prefix:
    """The prefixes of Y responses as a tree; its root is the empty one.

    Args:
        responses: distinct, none a prefix of another. log_probs: (Y, T) float64 nats of their tokens, 0 after the end.
    """
    root = Prefix()
    for ids, row in zip(responses, log_probs, strict=True):
        remaining = [*row.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        node = root
        for depth in range(len(ids) + 1):
            node.log_prob = float(np.logaddexp(node.log_prob, remaining[depth]))
            if depth < len(ids):
                node = node.next.setdefault(ids[depth], Prefix())
    return root


class VerifiablePolicy:
    """pi*(a|s), which is proportional to pi_ref(a|s) (1 + p(s, a) (exp(1 / b) - 1)).

    p(s, a) is the reference's probability to finish in an accepted response after a. Where no accepted response goes
    on, pi* is the reference.

    Args:
        task: whose kl_coef is the one wanted.

    Raises:
        InvalidArgumentError: for a task that the closed form does not hold for, and a reward without
            `accepted_responses`.
    """

    def __init__(self, task: Task) -> None:
        check_solvable(task)
        accepted = getattr(expected_reward(task), "accepted_responses", None)
        if accepted is None:
            raise InvalidArgumentError(
                f"`reward` must have a method accepted_responses for this solver, got {task.reward!r}."
            )
        if task.gamma != 1:
            raise InvalidArgumentError(f"`gamma` must be 1 for the closed form, got {task.gamma!r}.")
        if task.missing_eos_penalty:
            raise InvalidArgumentError(
                f"`missing_eos_penalty` must be 0 for the closed form, got {task.missing_eos_penalty!r}."
            )
        self.task = task
        self.lm = task.reference("cpu")
        self._accepted: AcceptedResponses = accepted
        self._tables: dict[tuple[int, ...], Prefix] = {}

    @property
    def device(self) -> torch.device:
        """Where the reference is."""
        return self.lm.device

    def table(self, prompt_ids: Sequence[int]) -> Prefix:
        """The empty prefix of a prompt's accepted responses, and with it all others; made once a prompt.

        Raises:
            InvalidArgumentError: for an accepted response that no episode can be.
        """
        key = tuple(int(token) for token in prompt_ids)
        if key not in self._tables:
            responses = list(dict.fromkeys(tuple(int(token) for token in y) for y in self._accepted(key)))
            for response in responses:
                check_complete(response, self.lm, self.task)
            self._tables[key] = prefix_table(responses, self._log_probs(key, responses))
        return self._tables[key]

    def _log_probs(self, prompt_ids: tuple[int, ...], responses: list[tuple[int, ...]]) -> Tensor:
        """(Y, T) float64 nats of the tokens of responses, from one teacher-forced pass."""
        horizon = self.task.max_new_tokens
        if not responses:
            return torch.zeros((0, horizon), dtype=torch.float64)
        prompt = torch.tensor([prompt_ids]).expand(len(responses), -1)
        ids, mask = pad_right(responses, self.lm.pad_token_id, horizon)
        return self.lm.response_log_probs(prompt, torch.ones_like(prompt, dtype=torch.bool), ids, mask).double()

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> VerifiableState:
        """Reads prompts (B, P), left-padded."""
        reference = CausalPolicy(self.lm).begin(prompt_ids, prompt_mask, max_new_tokens)
        return VerifiableState(self, reference, prompt_ids, prompt_mask)


class VerifiableState:
    """B running responses of a `VerifiablePolicy`."""

    def __init__(
        self, policy: VerifiablePolicy, reference: PolicyState, prompt_ids: Tensor, prompt_mask: Tensor
    ) -> None:
        self._policy = policy
        self._reference = reference
        self._nodes = [_ELSEWHERE] * len(prompt_ids)
        self._look_up(range(len(prompt_ids)), prompt_ids, prompt_mask)

    def _look_up(self, rows: Sequence[int], prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        for row, ids, mask in zip(rows, prompt_ids, prompt_mask.bool(), strict=True):
            self._nodes[row] = self._policy.table(ids[mask].tolist())

    @property
    def logits(self) -> Tensor:
        """(B, V) float64 log pi*."""
        logits = self._reference.logits.double().log_softmax(-1)
        entries = [
            (row, token, after.log_prob) for row, node in enumerate(self._nodes) for token, after in node.next.items()
        ]
        if entries:
            rows, tokens, log_probs = zip(*entries, strict=True)
            gains = log_exp_reward(torch.tensor(log_probs, dtype=torch.float64), self._policy.task.kl_coef)
            entry = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
            logits[entry] += gains.to(logits.device)
        return logits.log_softmax(-1)

    @property
    def values(self) -> Tensor:
        """(B,) float64 V*(s), in units of the score."""
        log_probs = torch.tensor([node.log_prob for node in self._nodes], dtype=torch.float64)
        kl_coef = self._policy.task.kl_coef
        return (kl_coef * log_exp_reward(log_probs, kl_coef)).to(self._policy.device)

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        self._reference.begin(rows, prompt_ids, prompt_mask)
        self._look_up(rows.tolist(), prompt_ids, prompt_mask)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        self._reference.step(tokens)
        self._nodes = [
            node.next.get(token, _ELSEWHERE) for node, token in zip(self._nodes, tokens.tolist(), strict=True)
        ]

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._reference.keep(rows)
        self._nodes = [self._nodes[row] for row in rows.tolist()]


def check_complete(response: Sequence[int], lm: CausalLM, task: Task) -> None:
    """Raises `InvalidArgumentError` unless an episode can end with exactly this response."""
    for token in response:
        if not lm.is_legal(token):
            raise InvalidArgumentError(f"`accepted_responses` must hold token ids, and {token} is none: {response!r}.")
    end = task.end_rule(lm).find_end(response)
    if end is None:
        raise InvalidArgumentError(
            f"`accepted_responses` must be whole: {task.max_new_tokens} tokens, or an EOS as the last one from token "
            f"{task.min_new_tokens} on; got {response!r}."
        )
    if end < len(response) - 1:
        raise InvalidArgumentError(
            f"`accepted_responses` must end where the episode does, after token {end}, got {response!r}."
        )


def solve_verifiable(task: Task, split: str = "test") -> Optimum:
    """The optimum of a task whose reward has `accepted_responses(prompt_ids)` and is 1 for these and 0 for all others.

    Costs one teacher-forced pass over the accepted responses.

    Args:
        task: whose kl_coef is the one wanted; its gamma is 1 and its `missing_eos_penalty` 0.
        split: which of its prompts.

    Returns:
        `Optimum` with a `VerifiablePolicy`.

    Raises:
        InvalidArgumentError: at `kl_coef=0`, for a task that the closed form does not hold for, and for an accepted
            response that no episode can be.
    """
    check_split(task, split)
    policy = VerifiablePolicy(task)
    prompts = policy.lm.encode_all(tuple(task.prompts[split]))
    log_probs = torch.tensor([policy.table(ids).log_prob for ids in prompts], dtype=torch.float64)
    values = task.kl_coef * log_exp_reward(log_probs, task.kl_coef)
    return Optimum.solved("verifiable", values, log_probs.exp(), policy)
