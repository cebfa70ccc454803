"""Prompts that are too long for the model or for the user's limit: an error, left out, or cut."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from lmgym.data.prompts import PromptText
from lmgym.errors import InvalidArgumentError, shorten
from lmgym.models.causal import CausalLM
from lmgym.tasks.base import Task

_MAX_NAMED_ROWS = 3  # in a message


def fit_prompts(task: Task, lm: CausalLM, *, tell: bool = True) -> Task:
    """A task whose prompts have at most `max_prompt_tokens` tokens, and leave the model positions for a response.

    Args:
        task: the task; its `on_long` says what becomes of longer ones. lm: its reference.
        tell: warns of those that are left out.

    Returns:
        The task itself where every prompt fits; else one without a stored optimum.

    Raises:
        InvalidArgumentError: with the first of the longer prompts, for "error" and where a split has no shorter one.
    """
    on_long = task.on_long
    limit = _limit(task, lm)
    if limit is None:
        return task
    fitted: dict[str, Sequence[str]] = {}
    for split, texts in task.prompts.items():
        lengths = [len(ids) for ids in lm.encode_all(tuple(texts))]
        long = [i for i, length in enumerate(lengths) if length > limit]
        if not long:
            fitted[split] = texts
            continue
        fault = _describe(split, texts, lengths, long, limit)
        if on_long == "error" or (on_long == "skip" and len(long) == len(texts)):
            raise InvalidArgumentError(f"{fault} {_remedy(task, lm, max(lengths))}")
        if on_long == "skip":
            fitted[split] = [text for text, length in zip(texts, lengths, strict=True) if length <= limit]
            if tell:
                warnings.warn(f"{fault} They are left out.", stacklevel=2)
        else:
            starts = lm.remember(_find_starts, tuple(texts), limit)
            fitted[split] = [_from(text, start) for text, start in zip(texts, starts, strict=True)]
    if all(fitted[split] is task.prompts[split] for split in fitted):
        return task
    return replace(task, prompts=fitted, optima={})


def _limit(task: Task, lm: CausalLM) -> int | None:
    """The most tokens that a prompt may have; None where there is no limit."""
    limits = [] if task.max_prompt_tokens is None else [task.max_prompt_tokens]
    if lm.max_positions is not None:
        if lm.max_positions <= task.max_new_tokens:
            raise InvalidArgumentError(
                f"`max_new_tokens` must be at most {lm.max_positions - 1}, got {task.max_new_tokens}: the model has "
                f"{lm.max_positions} positions for prompt and response."
            )
        room = lm.max_positions - task.max_new_tokens
        if task.max_prompt_tokens is not None and task.max_prompt_tokens > room:
            raise InvalidArgumentError(
                f"`max_prompt_tokens` must be at most {room}, got {task.max_prompt_tokens}: the model has "
                f"{lm.max_positions} positions and `max_new_tokens` is {task.max_new_tokens}."
            )
        limits.append(room)
    return min(limits, default=None)


def _describe(split: str, texts: Sequence[str], lengths: Sequence[int], long: Sequence[int], limit: int) -> str:
    few = []
    for i in long[:_MAX_NAMED_ROWS]:
        location = texts[i].location if isinstance(texts[i], PromptText) else ""  # type: ignore[attr-defined]
        few.append(f"{location or f'item {i}'} has {lengths[i]} ({shorten(texts[i], 60)})")
    more = f", and {len(long) - len(few)} more" if len(long) > len(few) else ""
    return f"`prompts[{split!r}]` must have at most {limit} tokens each, and {'; '.join(few)}{more}."


def _remedy(task: Task, lm: CausalLM, longest: int) -> str:
    cause = "Raise `max_prompt_tokens`"
    if lm.max_positions is not None and longest + task.max_new_tokens > lm.max_positions:
        most = lm.max_positions - longest
        cause = f"The model has {lm.max_positions} positions: "
        cause += f"lower `max_new_tokens` to {most} or less" if most > 0 else "take one with more"
    return f"{cause}, shorten the prompts, or take `on_long='skip'` or 'truncate_left'."


def _find_starts(lm: CausalLM, texts: tuple[str, ...], limit: int) -> list[int]:
    """Where the longest end of each text begins that has at most `limit` tokens."""
    encoded = lm.encode_all(texts)
    return [0 if len(ids) <= limit else _find_start(text, limit, lm) for text, ids in zip(texts, encoded, strict=True)]


def _find_start(text: str, limit: int, lm: CausalLM) -> int:
    """Where the longest end of a text begins, in whole characters, that has at most `limit` tokens.

    It is cut as text, so that the tokenizer begins it as any other prompt, with a start token where it has one.
    """
    start = lm.start_of_last(text, limit + 1) or 0  # a token too many, and then character by character
    while len(lm.encode(text[start:])) > limit:
        excess = len(lm.encode(text[start:])) - limit
        start += max(1, excess // 4)  # a character may be several tokens
        if not text[start:].strip():
            raise InvalidArgumentError(f"`max_prompt_tokens` must leave room for a text, got {limit}, for {text!r}.")
    return start


def _from(text: str, start: int) -> str:
    """A text from a character on, with the columns of its row."""
    if start == 0:
        return text
    return text.with_text(text[start:]) if isinstance(text, PromptText) else text[start:]
