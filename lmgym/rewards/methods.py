"""The methods that a reward may have, and how an environment calls them."""

from __future__ import annotations

import inspect
from typing import Any

from lmgym.errors import InvalidArgumentError

# What an environment calls where a reward has it, with an example of the arguments, and when.
_METHODS: dict[str, tuple[tuple[Any, ...], str]] = {
    "reseed": ((0,), "with a seed when it is reset with one"),
    "get_state": ((), "without arguments when a run is saved"),
    "set_state": ((None,), "with what `get_state` gave when a run goes on"),
    "for_tokenizer": ((None,), "with the policy's tokenizer when it is made"),
    "score_range": (((), 1), "with the token ids of a prompt and `max_new_tokens` when it is graded"),
}


def check_methods(reward: Any) -> None:
    """Raises `InvalidArgumentError` where a reward has an attribute of a name that an environment calls otherwise."""
    for name, (arguments, when) in _METHODS.items():
        method = getattr(reward, name, None)
        if method is None:
            continue
        if not callable(method) or not _takes(method, arguments):
            raise InvalidArgumentError(
                f"`reward.{name}` must be a method that the environment can call {when}, got {method!r}. "
                "An attribute that means something else needs another name."
            )


def _takes(method: Any, arguments: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True
