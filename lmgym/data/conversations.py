"""Conversations: lists of messages with a role and a content, and the text that a chat template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmgym.data.rows import check_text
from lmgym.errors import InvalidArgumentError, shorten

Messages = Sequence[Mapping[str, str]]


def is_conversation(value: object) -> bool:
    """Whether a value is meant as a conversation: a list that begins with a message."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return isinstance(value[0], Mapping) and "role" in value[0]


def check_messages(argument: str, messages: object, location: str) -> list[dict[str, str]]:
    """A conversation as plain dicts.

    Raises:
        InvalidArgumentError: for what is none; only texts can be read, no pictures and no tool calls.
    """
    if not is_conversation(messages):
        raise InvalidArgumentError(f"`{argument}` must hold messages, and {location} is {shorten(messages)}.")
    checked = []
    for message in messages:  # type: ignore[attr-defined]
        known = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not known or not isinstance(message.get("content"), str):
            raise InvalidArgumentError(
                f'`{argument}` must hold messages with texts under "role" and "content", and {location} has '
                f"{shorten(message)}."
            )
        check_text(argument, message["content"], location, may_be_empty=True)
        checked.append({"role": message["role"], "content": message["content"]})
    return checked


def reply_of(completion: str | Messages) -> str:
    """The text of a completion, as a reward gets it: a text, or the assistant's message after a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def render(argument: str, messages: object, tokenizer: Any, location: str, *, ended: bool = False) -> str:
    """The text of a conversation, from the tokenizer's chat template.

    The text asks for an answer, or goes on with the last message where that is the assistant's. It has no start token
    in front where the tokenizer puts one there itself, so that there is never more than one.

    Args:
        argument: what the conversation was given as, for messages. messages: the conversation.
        tokenizer: a Hugging Face tokenizer, or a function without arguments that loads one.
        location: where the conversation stands. ended: it is complete, and asks for nothing.

    Raises:
        InvalidArgumentError: for no tokenizer, one without a chat template, and one whose template refuses.
    """
    checked = check_messages(argument, messages, location)
    if callable(tokenizer) and not hasattr(tokenizer, "apply_chat_template"):
        tokenizer = tokenizer()
    if tokenizer is None:
        raise InvalidArgumentError(
            f"`{argument}` must be texts where there is no tokenizer, and {location} is messages."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgumentError(
            f"`{argument}` holds conversations, and the tokenizer has no chat template: take a model that has one, set "
            "`tokenizer.chat_template` and save it, or give prompts as texts."
        )
    goes_on = checked[-1]["role"] == "assistant" and not ended
    try:
        text = tokenizer.apply_chat_template(
            checked,
            tokenize=False,
            add_generation_prompt=not goes_on and not ended,
            continue_final_message=goes_on,
        )
    except Exception as error:  # a template raises what it likes
        raise InvalidArgumentError(f"`{argument}`: the chat template refuses {location}: {error}.") from error
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return str(text[len(start) :])
    return str(text)


def render_answer(argument: str, asked: Messages, answer: Messages, tokenizer: Any, location: str) -> tuple[str, str]:
    """The text of a conversation that asks, and what its answer adds to it, up to the end token that it ends with.

    Args:
        argument: what they were given as, for messages. asked: the conversation. answer: the messages that follow.
        tokenizer: as for `render`. location: where they stand.

    Raises:
        InvalidArgumentError: as `render`, and for a template that writes the question in another way once it is
            answered.
    """
    prompt = render(argument, asked, tokenizer, location)
    whole = render(argument, [*asked, *answer], tokenizer, location, ended=True)
    if not whole.startswith(prompt):
        raise InvalidArgumentError(
            f"`{argument}`: the chat template must write a conversation in the same way with and without its answer, "
            f"and {location} becomes {shorten(whole)} after {shorten(prompt)}."
        )
    added = whole[len(prompt) :]
    end = tokenizer.eos_token
    at = added.rfind(end) if end else -1
    return prompt, added if at < 0 else added[: at + len(end)]
