"""A reward function is called once before an episode begins: a wrong signature is then explained, not met later."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from lmgym.errors import InvalidArgumentError, RewardError
from lmgym.rewards.calling import handed_over

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


def leaves(reward: Any) -> Iterator[Any]:
    """The reward functions inside those that hand over what they are given; a reward that does not, itself."""
    inside = getattr(reward, "rewards", None) or [getattr(reward, "expected", None)]
    if not getattr(reward, "reads_plain_text", False) or inside == [None]:
        yield reward
        return
    for part in inside:
        if part is not reward:
            yield from leaves(part)


def try_out(reward: Any, prompts: list[str], completions: list[str], columns: dict[str, Any]) -> None:
    """Calls every function in a reward for episodes, as an environment will; those of lmgym are known to work.

    What is random in it stands afterwards where it stood.

    Raises:
        InvalidArgumentError: for a function that cannot be called with the arguments that there are.
        RewardError: for one that raises, or does not return a score an episode.
    """
    from lmgym.rewards.base import scores_or_none

    for function in leaves(reward):
        if getattr(function, "reads_plain_text", False):
            continue
        arguments = handed_over(function, prompts, completions, columns)
        check_signature(function, arguments)
        state = function.get_state() if hasattr(function, "get_state") and hasattr(function, "set_state") else None
        try:
            scores_or_none(function, prompts, completions, columns)
        except RewardError:
            raise
        except Exception as error:
            hint = ""
            if isinstance(error, TypeError) and isinstance(arguments["completions"][0], str):
                hint = ' A function that reads completion[0]["content"] needs prompts that are conversations.'
            raise RewardError(
                f"The reward function {_name(function)} was called once to try it out, and raised "
                f"{type(error).__name__}: {error}. It was given prompts={arguments['prompts']!r}, "
                f"completions={arguments['completions']!r} and the columns {sorted(arguments.keys() - _TEXTS)}.{hint}"
            ) from error
        finally:
            if state is not None:
                function.set_state(state)


_TEXTS = {"prompts", "completions"}


def check_signature(function: Any, arguments: dict[str, Any]) -> None:
    """Raises `InvalidArgumentError` for a function that does not take these keyword arguments."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise InvalidArgumentError(
            f"`reward` must be a function that can be called with the keywords {given}: {_name(function)}"
            f"{inspect.signature(function)} cannot ({error}). Give it **columns for those that it does not need; one "
            "that it needs must be a column of the prompts' rows."
        ) from error
    except ValueError:  # a builtin without a signature: calling it will tell
        return


def _takes(method: Any, arguments: tuple[Any, ...]) -> bool:
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
