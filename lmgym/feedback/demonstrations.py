"""Responses to imitate: rows of a prompt and its completion, conversations, and the best of what people judged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmgym.data.conversations import check_messages, is_conversation, render, render_answer
from lmgym.data.rows import Row, check_text, column, read_rows
from lmgym.errors import InvalidArgumentError, shorten
from lmgym.feedback.comparisons import demonstrations_of
from lmgym.feedback.files import locate_records
from lmgym.feedback.json_form import text_to_json
from lmgym.feedback.layouts import is_record
from lmgym.feedback.rendering import render_completion
from lmgym.feedback.sources import iterate_items


class Demonstration(NamedTuple):
    """A response to imitate.

    Attributes:
        prompt: the text before it. completion: its text. location: where it was, for messages.
    """

    prompt: str
    completion: str
    location: str


def read_demonstrations(argument: str, source: object, tokenizer: Any) -> Iterator[Demonstration]:
    """The demonstrations of a file, a list of rows, a data set or a table.

    It holds records of feedback, in any layout that `lmgym.feedback.files` reads: of each the corrected text, or the
    completions that were preferred to others. Or rows of its own: "prompt" and "completion", or "messages" of which the
    last is the answer.

    Args:
        argument: what the source was given as, for messages. source: where they are.
        tokenizer: of the policy that imitates; None reads texts alone.

    Raises:
        InvalidArgumentError: naming the rows that are neither.
    """
    first = next(itertools.islice(iterate_items(argument, source), 1), None)
    if first is None:
        return
    if is_record(first.row):
        for location, record in locate_records(source, argument):
            where = f"{location} of `{argument}`"
            prompt = record.prompt
            if not isinstance(prompt, str):
                prompt = render(argument, text_to_json(prompt), tokenizer, where)
            for item in demonstrations_of(record):
                completion = render_completion(argument, record, item, tokenizer, where)
                yield Demonstration(prompt, str(completion.text), where)
        return
    for row in read_rows(argument, source, "prompt"):
        yield Demonstration(*read_demonstration(argument, row, tokenizer), row.location)


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
