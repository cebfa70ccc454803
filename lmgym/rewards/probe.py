"""A call of a reward function before the first episode, so that a wrong signature is explained at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from lmgym.errors import InvalidArgumentError, RewardError
from lmgym.rewards.base import scores_or_none
from lmgym.rewards.calling import make_arguments


def find_leaves(reward: Any) -> Iterator[Any]:
    """The reward functions inside combined and noisy rewards; any other reward is its own leaf."""
    inside = getattr(reward, "rewards", None) or [getattr(reward, "expected", None)]
    if not getattr(reward, "reads_plain_text", False) or inside == [None]:
        yield reward
        return
    for part in inside:
        if part is not reward:
            yield from find_leaves(part)


def try_out(reward: Any, prompts: list[str], completions: list[str], columns: dict[str, Any]) -> None:
    """Calls every function in a reward for episodes, as an environment will; those of lmgym are skipped.

    The state of a random function is restored afterwards.

    Raises:
        InvalidArgumentError: for a function that cannot be called with the arguments.
        RewardError: for a function that raises, or does not return one score an episode.
    """
    for function in find_leaves(reward):
        if getattr(function, "reads_plain_text", False):
            continue
        arguments = make_arguments(function, prompts, completions, columns)
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


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
