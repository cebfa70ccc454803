"""Pairs of answers, and demonstrations, as other people write them: texts or conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmgym.data.conversations import check_messages, is_conversation, render_answer
from lmgym.data.rows import Row, check_text, column
from lmgym.errors import InvalidArgumentError, shorten
from lmgym.models.texts import common_length

PAIR = ("chosen", "rejected")


def read_pair(argument: str, row: Row, tokenizer: Any) -> tuple[str, str, str]:
    """Prompt, chosen and rejected completion of a row with "chosen" and "rejected"; `prompt + completion` is the text.

    Args:
        argument: what the rows were given as, for messages. row: the row.
        tokenizer: of the policy; None reads texts alone, and puts no EOS after them.

    Raises:
        InvalidArgumentError: naming the row.
    """
    prompt = row.columns.get("prompt")
    chosen, rejected = (row.columns[side] for side in PAIR)
    if is_conversation(chosen) and is_conversation(rejected):
        return _read_conversations(argument, row, prompt, chosen, rejected, tokenizer)
    texts = [check_text(argument, text, row.location) for text in (chosen, rejected)]
    if prompt is None:
        start = _common_start(*texts)
        prompt = texts[0][:start]
        texts = [text[start:] for text in texts]
    check_text(argument, prompt, row.location)
    end = getattr(tokenizer, "eos_token", None) or ""
    chosen, rejected = (text if text.endswith(end) else text + end for text in texts)
    return prompt, chosen, rejected


def _common_start(chosen: str, rejected: str) -> int:
    """Characters that both texts begin with; a space before the first difference belongs to the answers."""
    start = common_length(chosen, rejected)
    return start - 1 if start and chosen[start - 1] == " " else start


def _read_conversations(
    argument: str, row: Row, prompt: object, chosen: Sequence[Any], rejected: Sequence[Any], tokenizer: Any
) -> tuple[str, str, str]:
    """The same of conversations, which may have the prompt in front, as messages that both begin with."""
    sides = [check_messages(argument, messages, row.location) for messages in (chosen, rejected)]
    if is_conversation(prompt):
        asked = check_messages(argument, prompt, row.location)
        sides = [side[len(asked) :] if side[: len(asked)] == asked else side for side in sides]
    else:
        shared = common_length(*sides)
        asked = sides[0][:shared]
        sides = [side[shared:] for side in sides]
    if not asked or not all(sides):
        raise InvalidArgumentError(
            f"`{argument}` must hold conversations that share a question and have an answer each, and "
            f"{row.location} has {shorten(chosen)} and {shorten(rejected)}."
        )
    (text, better), (_, worse) = (render_answer(argument, asked, side, tokenizer, row.location) for side in sides)
    return text, better, worse


def read_demonstration(argument: str, row: Row, tokenizer: Any) -> tuple[str, str]:
    """Prompt and completion of a row with "prompt" and "completion", or with "messages", the last being the answer.

    Texts are as they are: a completion has the EOS as text where the response ends by itself.

    Raises:
        InvalidArgumentError: naming the row.
    """
    if "messages" in row.columns and "prompt" not in row.columns:
        messages = check_messages(argument, row.columns["messages"], row.location)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InvalidArgumentError(
                f"`{argument}` must hold messages that end with the assistant's, and {row.location} has "
                f"{shorten(messages)}."
            )
        return render_answer(argument, messages[:-1], messages[-1:], tokenizer, row.location)
    prompt, completion = (column(argument, row, key) for key in ("prompt", "completion"))
    if is_conversation(prompt) and is_conversation(completion):
        return render_answer(argument, prompt, completion, tokenizer, row.location)
    check_text(argument, prompt, row.location)
    return prompt, check_text(argument, completion, row.location, may_be_empty=True)
