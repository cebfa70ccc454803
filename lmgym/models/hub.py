"""Finds a model on Hugging Face's hub with one short request, before transformers makes many that it repeats."""

from __future__ import annotations

import os

from lmgym.errors import InvalidArgumentError

TIMEOUT = 5.0  # seconds that the hub has for its answer


def locate(argument: str, name: str) -> str:
    """The directory, or the name on the hub, that a model can be loaded from.

    Where the hub cannot be reached, it is the directory in the cache that an earlier load left.

    Args:
        argument: what the name is called in messages. name: a local directory or a hub name.

    Raises:
        InvalidArgumentError: for a model that is neither on the hub, as far as one may see, nor in the cache.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise InvalidArgumentError(
            f"`{argument}` must be a local directory or a hub name, and neither a directory here nor a model on the "
            f"hub is called {name!r}. Of a private model, log in first: `hf auth login`."
        ) from error
    except HfHubHTTPError:
        return name  # it answers: the load itself says what is wrong
    except Exception as error:  # whatever its network library raises, which changes with its versions
        return _cached(argument, name, error)
    return name


def _cached(argument: str, name: str, reason: Exception) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise InvalidArgumentError(
            f"`{argument}` must be a local directory or a hub name: there is no directory {name!r}, no model of that "
            f"name in the cache, and the hub cannot be asked ({reason}). Where there is a network, "
            f"`hf download {name} --local-dir DIRECTORY`; then name the directory."
        ) from error
