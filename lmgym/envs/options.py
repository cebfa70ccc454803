"""What `reset` takes, checked: seeds, and the options that choose a prompt, a part of a response and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmgym.envs.mdp import TokenMDP
from lmgym.envs.prompts import Prompt, PromptOrder
from lmgym.envs.token_ids import as_token_ids, is_integer
from lmgym.errors import InvalidArgumentError, shorten, unknown_name

_PROMPT_OPTIONS = ("prompt", "prompt_ids", "prompt_index")
RESET_OPTIONS = (*_PROMPT_OPTIONS, "response_ids")


def as_seed(seed: Any) -> int | None:
    """A seed as an int, or None.

    Raises:
        InvalidArgumentError: for anything else, a bool and a negative number included.
    """
    if seed is None:
        return None
    if not is_integer(seed) or seed < 0:
        raise InvalidArgumentError(f"`seed` must be an int >= 0, got {shorten(seed)}.")
    return int(seed)


def as_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """A seed for each row: seed, seed + 1, ..., or those of a list.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if seed is None or is_integer(seed):
        first = as_seed(seed)
        return [None if first is None else first + i for i in range(num_envs)]
    if not isinstance(seed, (list, tuple)) and not (isinstance(seed, np.ndarray) and seed.ndim == 1):
        raise InvalidArgumentError(f"`seed` must be an int or {num_envs} seeds, got {shorten(seed)}.")
    if len(seed) != num_envs:
        raise InvalidArgumentError(f"`seed` must be an int or {num_envs} seeds, got {len(seed)} of them.")
    return [as_seed(one) for one in seed]


def as_options(options: Any) -> dict[str, Any]:
    """Reset options as a dict of one's own.

    Raises:
        InvalidArgumentError: for anything but a mapping with texts as keys, or None.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InvalidArgumentError(f"`options` must be a dict or None, with names as keys, got {shorten(options)}.")
    return dict(options)


def as_reset_mask(mask: Any, num_envs: int) -> npt.NDArray[np.bool_]:
    """The rows that a reset is for: all of them where the option is None.

    Raises:
        InvalidArgumentError: for anything but a bool array (N,) with a True in it.
    """
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    if not isinstance(mask, np.ndarray) or mask.shape != (num_envs,) or mask.dtype != np.bool_ or not mask.any():
        raise InvalidArgumentError(
            f"`options['reset_mask']` must be a bool array of shape ({num_envs},) with a True in it, got {mask!r}."
        )
    return mask


def choose_prompt(
    mdp: TokenMDP, order: PromptOrder, options: dict[str, Any] | None, known: Sequence[str] = RESET_OPTIONS
) -> tuple[Prompt, Sequence[int]]:
    """The prompt, and the response prefix, that reset options ask for."""
    options = as_options(options)
    if not options:
        return order.take(), ()
    for name in options:
        if name not in known:
            raise unknown_name("options", name, known)
    given = [name for name in _PROMPT_OPTIONS if name in options]
    if len(given) > 1:
        raise InvalidArgumentError(f"`options` must have at most one of {list(_PROMPT_OPTIONS)}, got {given}.")
    if "prompt" in options:
        prompt = mdp.prompts.of_text(options["prompt"])
    elif "prompt_ids" in options:
        prompt = mdp.prompts.of_ids(options["prompt_ids"])
    elif "prompt_index" in options:
        prompt = mdp.prompts[options["prompt_index"]]
    else:
        prompt = order.take()
    prefix = as_token_ids("response_ids", options.get("response_ids", ()))
    mdp.check_prefix(prefix)
    return prompt, prefix
