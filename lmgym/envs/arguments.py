"""What `reset` and `step` take, checked: seeds, options, token ids and actions of any other kind are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmgym.errors import InvalidActionError, InvalidArgumentError, shorten


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


def as_token_ids(argument: str, ids: Any) -> list[int]:
    """Token ids as a list, from any sequence of integers, an array or a tensor.

    Raises:
        InvalidArgumentError: for anything else, such as a text, a set, or numbers that are not whole.
    """
    array = ids
    if hasattr(ids, "tolist"):
        try:
            array = ids.tolist()
        except RuntimeError:  # such as a tensor on the device "meta"
            array = None
    if not isinstance(array, Sequence) or isinstance(array, (str, bytes)) or not all(is_integer(i) for i in array):
        raise InvalidArgumentError(f"`{argument}` must be a sequence of token ids, got {shorten(ids)}.")
    return [int(i) for i in array]


def is_integer(value: object) -> bool:
    """Whether a value is a whole number, of Python or of NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def as_actions(actions: Any, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Token ids as an int64 array of a shape; raises `InvalidActionError` for anything else."""
    array = to_array(actions)
    if array is None or array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise InvalidActionError(f"`action` must be integer token ids of shape {shape}, got {shorten(actions)}.")
    return array.astype(np.int64)


def to_array(values: Any) -> npt.NDArray[Any] | None:
    """Values of any library as an array; None for what is none, such as a ragged list or a tensor without numbers."""
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = values.float() if values.is_floating_point() else values
        return np.asarray(values)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return None
