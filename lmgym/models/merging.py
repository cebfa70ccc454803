"""Adapters as whole models on disk, which load without peft."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoModelForCausalLM

from lmgym.errors import InvalidArgumentError, check_choice
from lmgym.files import replace_directory
from lmgym.models.adapters import is_adapter, load_pretrained
from lmgym.models.hub import locate
from lmgym.models.loading import quiet_loading
from lmgym.models.names import check_model_name
from lmgym.models.sharing import DTYPES


def save_merged(name: str | os.PathLike[str], directory: str | os.PathLike[str], dtype: str = "float32") -> None:
    """Writes the causal LM of an adapter, merged into its base in float32, with its tokenizer and generation config.

    An adapter on an adapter is merged with it.

    Args:
        name: directory or hub name of the adapter. directory: a new one. dtype: that the weights are written in.

    Raises:
        InvalidArgumentError: for a name that holds no adapter, or a directory that is there already.
        LmGymError: for an adapter that is damaged, or whose base is not there.
    """
    check_model_name("model", name)
    directory = Path(directory)
    check_choice("dtype", dtype, DTYPES)
    if directory.exists():
        raise InvalidArgumentError(f"`out` must be a directory that is not there yet, and {str(directory)!r} is.")
    name = locate("model", os.fspath(name))
    if not is_adapter(name):
        raise InvalidArgumentError(f"`model` must hold an adapter (adapter_config.json), and {name!r} does not.")
    model, tokenizer = load_pretrained("model", name, AutoModelForCausalLM, DTYPES[dtype])
    with replace_directory(directory) as scratch, quiet_loading():
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
