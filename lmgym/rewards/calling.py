"""How a reward function is called: the arguments that it gets, and the settings that it may not change.

A function from outside lmgym gets copies. What it sets for the process (the default dtype, the stream for printing) is
restored afterwards, so that no reward changes what the environment does next.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lmgym.data.prompts import columns_of, conversations_of
from lmgym.errors import RewardError

if TYPE_CHECKING:
    import asyncio

TOKEN_IDS = ("prompt_ids", "completion_ids")  # lists of ints: a plain copy is enough
_IMMUTABLE = (str, bytes, int, float, bool, type(None))


def call(reward: Any, prompts: list[str], completions: list[str], columns: dict[str, Any]) -> Any:
    """What a reward function returns for episodes; an async one is waited for.

    Args:
        reward: the function.
        prompts: texts; the columns of their rows are passed on as well.
        completions: texts.
        columns: `prompt_ids` and `completion_ids`, and what an outer reward was given.
    """
    arguments = make_arguments(reward, prompts, completions, columns)
    with _restore_settings():
        returned = reward(**arguments)
        if inspect.isawaitable(returned):
            returned = _wait_for(returned)
    return returned


def make_arguments(reward: Any, prompts: list[str], completions: list[str], columns: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a reward function is called with.

    If all prompts were conversations it gets those, and the completions as messages of the assistant, as in TRL. A
    reward of lmgym with `reads_plain_text` gets the texts as they are, without copies: it changes none of its
    arguments.
    """
    if getattr(reward, "reads_plain_text", False):
        return {"prompts": prompts, "completions": completions, **columns}
    columns = columns_of(prompts) | columns
    conversations = conversations_of(prompts)
    given: dict[str, Any] = {"prompts": [str(prompt) for prompt in prompts], "completions": list(completions)}
    if conversations is not None:
        given["prompts"] = conversations
        given["completions"] = [[{"role": "assistant", "content": completion}] for completion in completions]
    for name, values in columns.items():
        copy_value = list if name in TOKEN_IDS else _copy
        given[name] = [copy_value(value) for value in values]
    return given


def _copy(value: Any) -> Any:
    if isinstance(value, _IMMUTABLE):
        return value
    return copy.deepcopy(value)


@contextlib.contextmanager
def _restore_settings() -> Iterator[None]:
    """Restores, after the block, what a function may have set for the whole process.

    Raises:
        RewardError: where it closed the stream that the program prints to.
    """
    torch = sys.modules.get("torch")
    streams = sys.stdout, sys.stderr
    was_closed = [getattr(stream, "closed", False) for stream in streams]
    if torch is not None:
        dtype = torch.get_default_dtype()
        device = torch.get_default_device()
        grad = torch.is_grad_enabled()
    try:
        with np.errstate():
            yield
    finally:
        sys.stdout, sys.stderr = streams
        if torch is not None:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)
            if torch.get_default_device() != device:
                torch.set_default_device(device)
    for stream, before in zip(streams, was_closed, strict=True):
        if getattr(stream, "closed", False) and not before:
            raise RewardError(
                f"The reward function closed the program's own {getattr(stream, 'name', 'stream')}: let it open one of "
                "its own to write to."
            )


def _wait_for(awaitable: Any) -> Any:
    """The result of an awaitable."""
    import asyncio  # here and below: importing it takes a while, and few rewards are async

    return asyncio.run_coroutine_threadsafe(_as_coroutine(awaitable), _event_loop(os.getpid())).result()


async def _as_coroutine(awaitable: Any) -> Any:
    return await awaitable


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of async rewards, in a thread of its own; a forked process gets another one.

    It keeps running between calls, so that a client that a reward holds stays usable.
    """
    import asyncio

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"lmgym-rewards-{process}", daemon=True).start()
    return loop
