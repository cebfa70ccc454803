"""Prompts as token ids, and the order in which an environment draws them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lmgym.data.prompts import PromptIndex, PromptText
from lmgym.data.rows import check_text
from lmgym.envs.token_ids import as_token_ids, is_integer
from lmgym.errors import InvalidArgumentError, shorten
from lmgym.models.causal import CausalLM
from lmgym.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt: its token ids, its text, and its index in its split (-1 for one from elsewhere).

    The text is a `lmgym.data.prompts.PromptText` where its row has more columns.
    """

    ids: tuple[int, ...]
    text: str
    index: int


class PromptSet:
    """The prompts of a split, encoded once.

    Attributes:
        width: P, the prompt columns of an observation.
    """

    def __init__(self, task: Task, split: str, lm: CausalLM) -> None:
        self._lm = lm
        self._task = task
        encoded = {name: lm.encode_all(tuple(texts)) for name, texts in task.prompts.items()}
        longest = max(len(ids) for rows in encoded.values() for ids in rows)
        self.width = task.max_prompt_tokens or longest
        self._prompts = [
            Prompt(tuple(ids), text, i)
            for i, (ids, text) in enumerate(zip(encoded[split], task.prompts[split], strict=True))
        ]
        _warn_of_changes("prompts", lm, tuple(task.prompts[split]))

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        if not is_integer(index) or not 0 <= index < len(self._prompts):
            raise InvalidArgumentError(
                f"`prompt_index` must be an int from 0 to {len(self._prompts) - 1}, got {shorten(index)}."
            )
        return self._prompts[index]

    def spread(self, count: int) -> list[tuple[int, ...]]:
        """Token ids of so many prompts from all over the split, or of all where there are fewer."""
        every = max(1, len(self._prompts) // count)
        return [prompt.ids for prompt in self._prompts[::every][:count]]

    def of_text(self, text: str) -> Prompt:
        """Encodes a prompt from outside the split."""
        if not isinstance(text, str) or not text.strip():
            raise InvalidArgumentError(f"`prompt` must be a non-empty text, got {shorten(text)}.")
        check_text("prompt", text, "it")
        prompt = self._checked("prompt", self._lm.encode(text))
        _warn_of_changes("prompt", self._lm, (text,))
        own = prompt.text.with_text(text) if isinstance(prompt.text, PromptText) else text
        return replace(prompt, text=own)

    def of_ids(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> Prompt:
        """A prompt from outside the split, as token ids."""
        return self._checked("prompt_ids", as_token_ids("prompt_ids", ids))

    @cached_property
    def _index(self) -> PromptIndex:
        return self._task.prompt_index(self._lm)

    def _checked(self, argument: str, ids: list[int]) -> Prompt:
        if not 1 <= len(ids) <= self.width:
            raise InvalidArgumentError(f"`{argument}` must have 1 to {self.width} tokens, got {len(ids)}.")
        for i in ids:
            if not self._lm.is_legal(i):
                raise InvalidArgumentError(f"`{argument}` must hold token ids of the tokenizer, got {i}.")
        return Prompt(tuple(ids), self._index.find(ids, self._lm.decode_prompt), -1)


def _warn_of_changes(argument: str, lm: CausalLM, texts: tuple[str, ...]) -> None:
    """Warns of texts that the tokenizer changes before the model reads them."""
    changes = lm.changes(texts)
    if changes:
        text, read = changes[0]
        count = f"{len(changes)} of {len(texts)} prompts" if len(texts) > 1 else "the prompt"
        warnings.warn(
            f"`{argument}`: the tokenizer of the model changes {count}: where {text!r} was written, the model reads "
            f"{read!r}. The reward is given the text as it was written.",
            stacklevel=3,
        )


class PromptOrder:
    """One environment's endless stream of prompts: each epoch is a permutation of its own, or the split's own order."""

    def __init__(
        self, prompts: PromptSet, order: str, rng: Callable[[], np.random.Generator], *, start: int = 0, stride: int = 1
    ) -> None:
        self._prompts = prompts
        self._shuffle = order == "shuffle"
        self._rng = rng
        self._start = start
        self._stride = stride
        self.restart()

    def restart(self) -> None:
        """Begins a new stream with what the generator gives next."""
        self._epoch: npt.NDArray[np.int64] | None = None
        self._index = 0 if self._shuffle else self._start

    @property
    def position(self) -> tuple[npt.NDArray[np.int64] | None, int]:
        """The present permutation and the index in it, from which a copy of the stream goes on."""
        return self._epoch, self._index

    @position.setter
    def position(self, position: tuple[npt.NDArray[np.int64] | None, int]) -> None:
        self._epoch, self._index = position

    def peek(self) -> Prompt:
        """The next prompt, without taking it."""
        if not self._shuffle:
            return self._prompts[self._index % len(self._prompts)]
        if self._epoch is None or self._index == len(self._epoch):
            self._epoch = self._rng().permutation(len(self._prompts))
            self._index = 0
        return self._prompts[int(self._epoch[self._index])]

    def take(self) -> Prompt:
        """The next prompt, which is then used up."""
        prompt = self.peek()
        self._index += 1 if self._shuffle else self._stride
        return prompt
