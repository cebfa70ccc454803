"""The texts that a policy or a reward model reads of a record: conversations by the chat template, ends by the EOS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmgym.data.conversations import render, render_answer
from lmgym.feedback.json_form import text_to_json
from lmgym.feedback.records import Completion, Record


def render_record(argument: str, record: Record, tokenizer: Any, location: str) -> Record:
    """The record with texts alone, of which `prompt + completion` is what is read.

    A completion that has `ended` ends with the EOS, one that was cut does not, and of one that does not say nothing is
    changed.

    Args:
        argument: what the record was given as, for messages. record: of any judgement but a correction, which
            `lmgym.feedback.comparisons.ranked` makes a ranking.
        tokenizer: of the model that reads; None reads texts alone, and puts no EOS after them.
        location: where the record stands, for messages.

    Raises:
        InvalidArgumentError: for a conversation that the tokenizer's chat template cannot write.
    """
    prompt = record.prompt
    if not isinstance(prompt, str):
        prompt = render(argument, text_to_json(prompt), tokenizer, location)
    completions = [render_completion(argument, record, item, tokenizer, location) for item in record.completions]
    return replace(record, prompt=prompt, completions=tuple(completions))


def render_completion(
    argument: str, record: Record, completion: Completion, tokenizer: Any, location: str
) -> Completion:
    """A completion of a record as a text (`render_record`)."""
    text = completion.text
    if not isinstance(text, str):
        messages = (text_to_json(record.prompt), text_to_json(text))
        text = render_answer(argument, *messages, tokenizer, location)[1]
    end = getattr(tokenizer, "eos_token", None) or ""
    if completion.ended is True and not text.endswith(end):
        text += end
    elif completion.ended is False and end:
        text = text.removesuffix(end)
    return replace(completion, text=text)
