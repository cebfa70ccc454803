"""Prompts with the other columns of their rows, such as the answer that a verifiable reward checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lmgym.data.conversations import is_conversation, render
from lmgym.data.rows import Row, check_text, column, read_rows
from lmgym.errors import InvalidArgumentError

KEY = "prompt"
_OWN = ("prompts", "completions", "prompt_ids", "completion_ids", "completion")  # what a reward is given besides


class PromptText(str):
    """The text of a prompt that came in a row: a `str`, and what else is known of it.

    Attributes:
        columns: the other columns of the row; those of one split have the same names, and None where a row has none.
        messages: the conversation that the text was made from by the tokenizer's chat template, or None.
        location: where the row stands, for messages.
    """

    columns: Mapping[str, Any]
    messages: list[dict[str, str]] | None
    location: str

    def __new__(
        cls,
        text: str,
        columns: Mapping[str, Any] | None = None,
        messages: list[dict[str, str]] | None = None,
        location: str = "",
    ) -> PromptText:
        """The text, with what is known of it."""
        prompt = super().__new__(cls, text)
        prompt.columns = columns or {}
        prompt.messages = messages
        prompt.location = location
        return prompt

    def with_text(self, text: str) -> PromptText:
        """The same row with another text."""
        return PromptText(text, self.columns, self.messages, self.location)

    def row(self) -> dict[str, Any]:
        """The row as it was read."""
        return {KEY: str(self) if self.messages is None else self.messages, **self.columns}


def read_prompts(source: object, argument: str = "prompts", tokenizer: Any = None) -> tuple[str, ...]:
    """Prompts from a list of texts or rows, a data set, a table, or a file (`lmgym.data.rows.read_rows`).

    A row has its prompt under "prompt": a text, or a conversation (a list of messages with "role" and "content"), which
    the tokenizer's chat template makes a text. All other columns are kept, for the reward (`PromptText.columns`).

    Args:
        source: where they are. argument: what it was given as, for messages.
        tokenizer: a Hugging Face tokenizer, or a function without arguments that loads one; needed for conversations.

    Raises:
        InvalidArgumentError: naming the first row that has no prompt, or an empty one.
    """
    if isinstance(source, (list, tuple)):
        source = [item.row() if isinstance(item, PromptText) else item for item in source]
    rows = read_rows(argument, source, KEY)
    names = list(dict.fromkeys(name for row in rows for name in row.columns if name != KEY))
    prompts = []
    for row in rows:
        prompts.append(_prompt(argument, row, names, tokenizer))
    chats = sum(prompt.messages is not None for prompt in prompts)
    if 0 < chats < len(prompts):
        raise InvalidArgumentError(
            f"`{argument}` must be all texts or all conversations, got {chats} conversations among {len(prompts)} rows."
        )
    return tuple(prompts)


def _prompt(argument: str, row: Row, names: Sequence[str], tokenizer: Any) -> PromptText:
    prompt = column(argument, row, KEY)
    columns = {name: row.columns.get(name) for name in names}
    if not is_conversation(prompt):
        return PromptText(check_text(argument, prompt, row.location), columns, None, row.location)
    text = render(argument, prompt, tokenizer, row.location)
    return PromptText(check_text(argument, text, row.location), columns, [dict(m) for m in prompt], row.location)


def columns_of(prompts: Iterable[str]) -> dict[str, list[Any]]:
    """What the rows of a batch of prompts have besides the prompt, by name, one value a prompt, None for none.

    Columns that a reward is given anyway (`prompt_ids`, `completion_ids` and the texts) are not among them.
    """
    of_each = [prompt.columns if isinstance(prompt, PromptText) else {} for prompt in prompts]
    names = dict.fromkeys(name for columns in of_each for name in columns if name not in _OWN)
    return {name: [columns.get(name) for columns in of_each] for name in names}


def conversations_of(prompts: Sequence[str]) -> list[list[dict[str, str]]] | None:
    """The conversations that the prompts of a batch were made from; None where one was not."""
    found = []
    for prompt in prompts:
        if not isinstance(prompt, PromptText) or prompt.messages is None:
            return None
        found.append([dict(message) for message in prompt.messages])
    return found


class PromptIndex:
    """Finds the row of a prompt by its token ids.

    Args:
        prompts: token ids and text of each.
    """

    def __init__(self, prompts: Iterable[tuple[Sequence[int], str]]) -> None:
        self._rows: dict[tuple[int, ...], PromptText] = {}
        self._shared: set[tuple[int, ...]] = set()
        for ids, text in prompts:
            row = text if isinstance(text, PromptText) else PromptText(text)
            key = tuple(ids)
            if self._rows.setdefault(key, row).columns != row.columns:
                self._shared.add(key)
        names = dict.fromkeys(name for row in self._rows.values() for name in row.columns)
        self._no_values: dict[str, Any] = dict.fromkeys(names)

    def find(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> PromptText:
        """The row; of a prompt from elsewhere its text, by `decode`, with the same columns and None in each.

        Raises:
            InvalidArgumentError: for ids that two rows with other columns share, where nothing says which is meant.
        """
        key = tuple(ids)
        if key in self._shared:
            raise InvalidArgumentError(
                f"`prompts` must not have the prompt {self._rows[key]!r} in two rows with other columns where one is "
                "looked up by its tokens."
            )
        return self._rows.get(key) or PromptText(decode(ids), self._no_values)
