"""What a Hugging Face model may be called. Checked without loading torch."""

from __future__ import annotations

import os
import re

from lmgym.errors import InvalidArgumentError


def check_model_name(argument: str, name: object) -> None:
    """Raises unless `name` is a local directory with a model or an adapter, or could be a hub name; loads nothing."""
    if not isinstance(name, (str, os.PathLike)):
        raise InvalidArgumentError(f"`{argument}` must be a local directory or a hub name, got {name!r}.")
    text = os.fspath(name)
    if os.path.isdir(text):
        if not _holds(text):
            paths = [os.path.join(text, name) for name in sorted(os.listdir(text))]
            inside = [path for path in paths if _holds(path)]
            hint = f" Did you mean {inside[-1]!r}?" if inside else ""
            raise InvalidArgumentError(
                f"`{argument}` must be a directory with a config.json (or, of an adapter, an adapter_config.json), and "
                f"{text!r} has none.{hint}"
            )
    elif os.path.isfile(text):
        raise InvalidArgumentError(
            f"`{argument}` must be a directory with all files of a model, got the file {text!r}."
        )
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise InvalidArgumentError(f"`{argument}` must be a local directory or a hub name, and there is no {text!r}.")


def _holds(directory: str) -> bool:
    """Whether a directory holds a model or an adapter."""
    return any(os.path.isfile(os.path.join(directory, file)) for file in ("config.json", "adapter_config.json"))
