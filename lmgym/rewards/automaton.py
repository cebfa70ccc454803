"""Rewards that a deterministic finite automaton pays: a score whose optimum dynamic programming can find.

Shapes: B responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmgym.automata.automaton import Automaton
from lmgym.errors import InvalidArgumentError, RewardError


class AutomatonReward:
    """The score of an automaton as a reward function.

    Args:
        automaton: one for all prompts, or what makes the automaton of a prompt from its token ids.
    """

    reads_plain_text = True

    def __init__(self, automaton: Automaton | Callable[[tuple[int, ...]], Automaton]) -> None:
        if not isinstance(automaton, Automaton) and not callable(automaton):
            raise InvalidArgumentError(
                f"`automaton` must be an Automaton or a callable that makes one of prompt ids, got {automaton!r}."
            )
        self._automaton = automaton
        self._made: dict[tuple[int, ...], Automaton] = {}

    def for_prompt(self, prompt_ids: Sequence[int]) -> Automaton:
        """The automaton that scores the responses to a prompt; made once a prompt.

        Raises:
            RewardError: if the callable made something else.
        """
        if isinstance(self._automaton, Automaton):
            return self._automaton
        key = tuple(int(token) for token in prompt_ids)
        if key not in self._made:
            made: object = self._automaton(key)
            if not isinstance(made, Automaton):
                raise RewardError(f"`automaton` must make an Automaton of every prompt, and made {made!r} of {key}.")
            self._made[key] = made
        return self._made[key]

    @property
    def of_all_prompts(self) -> Automaton | None:
        """The automaton, where one scores the responses to all prompts."""
        return self._automaton if isinstance(self._automaton, Automaton) else None

    def score_range(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, float]:
        """What no score of a response to a prompt is below, and above."""
        return self.for_prompt(prompt_ids).score_range(max_new_tokens)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One score an episode, of its token ids.

        Args:
            prompts: B texts, not read.
            completions: B texts, not read.
            columns: `completion_ids`, B responses as token ids, the EOS included where there is one; and `prompt_ids`,
                B prompts as token ids, where each prompt has its own automaton.

        Raises:
            RewardError: if a column that is needed is not there, or is not of B rows.
            InvalidArgumentError: if an id is not in the vocabulary of the automaton.
        """
        size = len(completions)
        completion_ids: Sequence[Sequence[int]] | None = columns.get("completion_ids")
        prompt_ids: Sequence[Sequence[int]] | None = columns.get("prompt_ids")
        if completion_ids is None or len(completion_ids) != size:
            came = "none" if completion_ids is None else len(completion_ids)
            raise RewardError(f"An automaton needs {size} `completion_ids`, one a completion, got {came}.")
        if isinstance(self._automaton, Automaton):
            return self._automaton.score(completion_ids).tolist()
        if prompt_ids is None or len(prompt_ids) != size:
            came = "none" if prompt_ids is None else len(prompt_ids)
            raise RewardError(f"An automaton of each prompt needs {size} `prompt_ids`, one a completion, got {came}.")
        scores = np.empty(size)
        batches: dict[int, tuple[Automaton, list[int]]] = {}
        for row, ids in enumerate(prompt_ids):
            automaton = self.for_prompt(ids)
            batches.setdefault(id(automaton), (automaton, []))[1].append(row)
        for automaton, rows in batches.values():
            scores[rows] = automaton.score([completion_ids[row] for row in rows])
        return scores.tolist()
