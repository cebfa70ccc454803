"""pi* of a task whose reference is a `MarkovLM` and whose reward is an automaton's.

Shapes: B rows, P prompt columns, V vocabulary, X prompts, n some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmgym.automata import Automaton
from lmgym.ending import EndRule
from lmgym.errors import InvalidArgumentError
from lmgym.optimum.answer import Optimum, check_solvable, expected_reward
from lmgym.optimum.automaton.mdp import AutomatonMDP, PolicyLogits
from lmgym.optimum.automaton.reference import ReferenceTable
from lmgym.optimum.automaton.solution import AutomatonSolution
from lmgym.optimum.lengths import is_late
from lmgym.rewards.automaton import AutomatonReward
from lmgym.tasks.base import Task, check_split


class AutomatonPolicy:
    """pi* for any prompt: an automaton that has not been solved yet is solved when a prompt needs it.

    Args:
        task: whose kl_coef, gamma, ... are the ones wanted.
        prompts: X prompts to solve for now, as token ids.

    Attributes:
        task, reference: the task and its reference.
        solutions: one for each distinct automaton (and for each start, where the solution depends on it).

    Raises:
        InvalidArgumentError: for a reference or a reward that this solver does not know.
    """

    def __init__(self, task: Task, prompts: Sequence[Sequence[int]] = ()) -> None:
        check_solvable(task)
        lm = task.reference("cpu")
        reward = expected_reward(task)
        if not isinstance(reward, AutomatonReward):
            raise InvalidArgumentError(
                f"`reward` must be an AutomatonReward for this solver, got {type(reward).__name__}."
            )
        self.task: Task = task
        self.reference: ReferenceTable = ReferenceTable(lm)
        self.solutions: list[AutomatonSolution] = []
        self._reward: AutomatonReward = reward
        self._end_rule: EndRule[Tensor] = task.end_rule(lm)
        self._indices: dict[tuple[int, int], int] = {}  # by key, of a solution
        groups: dict[tuple[int, int], list[int]] = {}
        for i, ids in enumerate(prompts):
            groups.setdefault(self._key(ids), []).append(i)
        for rows in groups.values():
            self._solve([prompts[i] for i in rows], rows)

    @property
    def device(self) -> torch.device:
        """The CPU, where V* was computed."""
        return self._end_rule.is_eos.device

    def _key(self, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """What prompts with one solution have in common."""
        start = self.reference.first_context(prompt_ids) if is_late(self.task) else -1
        return id(self._reward.for_prompt(prompt_ids)), start

    def _solve(self, prompts: Sequence[Sequence[int]], indices: list[int]) -> None:
        """Adds the solution of prompts with one key, which have these indices in their split."""
        contexts, mdp = self._make_mdp(prompts)
        self._indices[self._key(prompts[0])] = len(self.solutions)
        self.solutions.append(AutomatonSolution(mdp, contexts, torch.tensor(indices)))

    def _make_mdp(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, AutomatonMDP]:
        """The contexts (n,) in which prompts with one automaton start, and their MDP."""
        contexts = torch.tensor([self.reference.first_context(ids) for ids in prompts])
        return contexts, AutomatonMDP(self.reference, self._reward.for_prompt(prompts[0]), self.task, self._end_rule)

    def best_responses(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(X,) float64 max over y of J(y|x), by one recursion for each distinct automaton (`AutomatonMDP`)."""
        groups: dict[int, list[int]] = {}
        for i, ids in enumerate(prompts):
            groups.setdefault(id(self._reward.for_prompt(ids)), []).append(i)
        values = torch.empty(len(prompts), dtype=torch.float64)
        for rows in groups.values():
            contexts, mdp = self._make_mdp([prompts[i] for i in rows])
            values[rows] = mdp.best_response(contexts)
        return values

    def solution_index(self, prompt_ids: Sequence[int]) -> int:
        """The index in `solutions` of the one that holds for a prompt."""
        if self._key(prompt_ids) not in self._indices:
            self._solve([prompt_ids], [-1])
        return self._indices[self._key(prompt_ids)]

    def state_logits(self, prompt_ids: Sequence[int], automaton: Automaton) -> PolicyLogits | None:
        """log pi* of a prompt as a function of the state; None where another automaton pays for that prompt."""
        solution = self.solutions[self.solution_index(prompt_ids)]
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
    """B running responses of an `AutomatonPolicy`. A row reads on after its end; its numbers then mean nothing."""

    def __init__(self, policy: AutomatonPolicy, rows: int) -> None:
        self._policy = policy
        # By row: index of the solution, step, context, automaton state; then token payments collected, and V*(x).
        self._ints = torch.zeros((4, rows), dtype=torch.int64)
        self._floats = torch.zeros((2, rows), dtype=torch.float64)
        self._answers: tuple[Tensor, Tensor] | None = None  # logits and values, once somebody has asked

    @property
    def logits(self) -> Tensor:
        """(B, V) float64 log pi*."""
        return self._answer()[0]

    @property
    def values(self) -> Tensor:
        """(B,) float64 V*(s), the expected discounted return from s on; what was collected before s is in it."""
        return self._answer()[1]

    @property
    def coordinates(self) -> Tensor:
        """(4, B) int64: the index of the solution, the step, the context, and the state of the automaton."""
        return self._ints.clone()

    def _answer(self) -> tuple[Tensor, Tensor]:
        """`logits` and `values`, computed once a step."""
        if self._answers is None:
            size = self._ints.shape[1]
            logits = torch.zeros((size, self._policy.reference.vocab_size), dtype=torch.float64)
            values = torch.zeros(size, dtype=torch.float64)
            task = self._policy.task
            for solution, t, rows in self._group_rows():
                _, _, contexts, states = self._ints[:, rows]
                logits[rows] = solution.log_policy(t, contexts, states)
                if task.dense_kl or task.gamma < 1:
                    values[rows] = solution.value(t, contexts, states)
            if task.dense_kl:
                values += self._floats[0]
            elif task.gamma == 1:  # the score minus the price of the whole KL is V*(x) for every response of pi*
                values = self._floats[1].clone()
            self._answers = (logits, values)
        return self._answers

    def _group_rows(self) -> Iterator[tuple[AutomatonSolution, int, Tensor]]:
        """Yields a solution, a step, and the rows (n,) that share both."""
        pairs, group = self._ints[:2].unique(dim=1, return_inverse=True)
        for i, (index, t) in enumerate(pairs.T.tolist()):
            yield self._policy.solutions[index], t, (group == i).nonzero().flatten()

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        policy = self._policy
        for row, ids, mask in zip(rows.tolist(), prompt_ids, prompt_mask.bool(), strict=True):
            prompt = ids[mask].tolist()
            index = policy.solution_index(prompt)
            context = policy.reference.first_context(prompt)
            solution = policy.solutions[index]
            self._ints[:, row] = torch.tensor([index, 0, context, solution.mdp.automaton.initial])
            self._floats[0, row] = 0.0
            self._floats[1, row] = solution.roots(torch.tensor([context]))[0]
        self._answers = None

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        after = self._ints.clone()
        collected = self._floats[0]
        for solution, t, rows in self._group_rows():
            states = self._ints[3, rows]
            chosen = tokens[rows]
            collected[rows] += solution.mdp.token_payments[chosen, states]
            after[3, rows] = solution.mdp.delta[chosen, states]
            after[1, rows] = min(t + 1, solution.mdp.horizon - 1)
        after[2] = self._policy.reference.next_contexts(self._ints[2], tokens)
        self._ints = after
        self._answers = None

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._ints = self._ints[:, rows]
        self._floats = self._floats[:, rows]
        self._answers = None


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
