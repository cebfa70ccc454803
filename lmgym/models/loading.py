"""Loads a model from a directory or a hub name, and checks every file, weight and token of it.

`from_pretrained` draws missing weights at random, leaves out weights that the model does not have, and makes a
tokenizer without words where there is none. Here each of these is one error that names the argument, the file and the
remedy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from lmgym.data.files import LFS_POINTER
from lmgym.errors import InvalidArgumentError, LmGymError

SETTINGS = ("config", "generation_config", "tokenizer_config", "special_tokens_map", "added_tokens", "adapter_config")
_MAX_NAMED_WEIGHTS = 4  # in a message
_MAX_REASON_LENGTH = 300  # characters of another library's message


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides the progress bar and the table of weights while a model loads: nobody expects them of `gym.make`."""
    shown = hf_logging.is_progress_bar_enabled()
    verbosity = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def loading(argument: str, name: str, kind: str) -> Iterator[None]:
    """Turns every exception of another library, while it loads a model, into one `LmGymError` with its cause.

    Args:
        argument: what the name is called in messages. name: a directory or a hub name. kind: of what is to be loaded.
    """
    try:
        with quiet_loading():
            yield
    except LmGymError:
        raise
    except Exception as error:  # tokenizers and safetensors raise nothing narrower
        reason = _find_damage(Path(name)) or _shorten(error)
        raise LmGymError(f"`{argument}` {name!r} could not be loaded with {kind}: {reason}") from error


def load_model(
    argument: str, name: str, auto_class: Any, dtype: torch.dtype, elsewhere: Iterable[str] = (), **options: Any
) -> Any:
    """Loads a Hugging Face model from a directory or hub name that holds the whole of it.

    Args:
        argument: what the name is called in messages. name: a directory or a hub name.
        auto_class: the transformers class that loads the model. dtype: of its weights.
        elsewhere: weights that come from another file, and may be missing. options: for transformers.

    Raises:
        LmGymError: with what is missing, is damaged or does not belong together.
    """
    check_files(argument, name)
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if not os.path.isdir(name):
        options["use_safetensors"] = True  # what is downloaded is never unpickled
    with loading(argument, name, auto_class.__name__):
        model, report = auto_class.from_pretrained(name, trust_remote_code=False, **options)
    check_report(argument, name, model, report, elsewhere)
    return model


def load_tokenizer(argument: str, name: str) -> Any:
    """The tokenizer of a directory or hub name.

    Raises:
        LmGymError: with the file that is damaged.
    """
    check_files(argument, name)
    with loading(argument, name, "AutoTokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def check_files(argument: str, name: str) -> None:
    """Raises `LmGymError` for a directory with a git-lfs pointer, or a settings file that is not JSON."""
    if not os.path.isdir(name):
        return
    for path in sorted(Path(name).iterdir()):
        if path.is_file() and _is_pointer(path):
            raise LmGymError(
                f"`{argument}` {name!r} has a git-lfs pointer in place of {path.name}: run `git lfs install` and "
                "`git lfs pull` there."
            )
    for path in [*(Path(name) / f"{stem}.json" for stem in SETTINGS), *sorted(Path(name).glob("*.index.json"))]:
        reason = _find_fault_of_json(path) if path.is_file() else None
        if reason is not None:
            raise LmGymError(f"`{argument}` {name!r} could not be loaded: {reason}")


def check_report(argument: str, name: str, model: Any, report: dict[str, Any], elsewhere: Iterable[str] = ()) -> None:
    """Raises `LmGymError` unless the files held exactly the weights that the model has.

    Args:
        argument: what the name is called in messages. name: a directory or a hub name.
        model: what was loaded. report: of transformers, on its loading.
        elsewhere: weights that come from another file.
    """
    kind = type(model).__name__
    missing = sorted(set(report["missing_keys"]) - set(elsewhere))
    if missing:
        raise LmGymError(
            f"`{argument}` {name!r} lacks weights of {kind}, which would be drawn at random: {_first(missing)}. "
            f"Name a model that was saved whole, as a {kind}."
        )
    mismatched = sorted(key for key in report["mismatched_keys"] if key[0] not in elsewhere)
    if mismatched:
        weight, found, wanted = mismatched[0]
        raise LmGymError(
            f"`{argument}` {name!r} has weights of other shapes than its config.json says: {weight} is {tuple(found)} "
            f"and would have to be {tuple(wanted)}. Copy all of its files again, from one model."
        )
    unexpected = sorted(report["unexpected_keys"])
    known = {_without_numbers(weight) for weight, _ in model.named_parameters()}
    surplus = [weight for weight in unexpected if _without_numbers(weight) in known]
    if surplus:
        raise LmGymError(
            f"`{argument}` {name!r} has weights of more layers than its config.json says: {_first(surplus)}. "
            "Copy all of its files again, from one model."
        )
    if unexpected:
        warnings.warn(
            f"`{argument}` {name!r} has weights that {kind} does not have, and they are left out: "
            f"{_first(unexpected)}.",
            stacklevel=2,
        )


def check_tokenizer(argument: str, name: str, model: Any, tokenizer: Any) -> None:
    """Raises unless a tokenizer has words, and the model embeds all of them.

    Raises:
        LmGymError: for a tokenizer without words. InvalidArgumentError: for one with more than the model embeds.
    """
    ids = set(tokenizer.get_vocab().values())
    if len(ids - set(tokenizer.all_special_ids)) < 2:
        raise LmGymError(
            f"`{argument}` {name!r} has no tokenizer: the {type(tokenizer).__name__} made for it knows {len(ids)} "
            "tokens and no words. Save the tokenizer that the model was trained with into the same directory: "
            "tokenizer.save_pretrained(...)."
        )
    embeddings = getattr(model.get_input_embeddings(), "weight", None)
    if embeddings is not None:
        check_embedded(f"`{argument}` {name!r}", embeddings.shape[0], max(ids) + 1)


def check_embedded(subject: str, embedded: int, vocab_size: int) -> None:
    """Raises `InvalidArgumentError` about a subject unless a model embeds as many tokens as its tokenizer has."""
    if vocab_size > embedded:
        raise InvalidArgumentError(
            f"{subject} embeds {embedded} tokens but its tokenizer has ids up to {vocab_size - 1}: they do not "
            "belong together. If tokens were added, resize the model with "
            "model.resize_token_embeddings(len(tokenizer)), train it and save both; if not, copy the tokenizer again."
        )


def check_finite_weights(argument: str, name: str, model: Any) -> None:
    """Raises `LmGymError` naming the weights that hold a number that is not finite."""
    broken = [weight for weight, x in model.named_parameters() if not bool(x.isfinite().all())]
    if broken:
        raise LmGymError(
            f"`{argument}` {name!r} has weights that are not finite numbers: {_first(broken)}. "
            "Name a checkpoint from before training diverged."
        )


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _find_damage(directory: Path) -> str | None:
    """Which file of a directory is damaged; None where none is, or there is no directory."""
    if not directory.is_dir():
        return None
    for path in sorted(directory.iterdir()):
        reason = None
        if path.suffix == ".json":
            reason = _find_fault_of_json(path) or _find_missing_part(path)
        elif path.suffix in (".safetensors", ".bin", ".model"):
            reason = _find_fault_of_weights(path)
        if reason is not None:
            return reason
    return None


def _find_fault_of_json(path: Path) -> str | None:
    """Why a file is not a JSON object, with what to do; None where it is."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{path.name} is not JSON ({error}). Copy or download it again."
    return None if isinstance(found, dict) else f"{path.name} must hold a JSON object, and holds {found!r}."


def _find_missing_part(path: Path) -> str | None:
    """Why an index of weights does not lead to all of them, with what to do; None where it does, or is none."""
    if not path.name.endswith(".index.json"):
        return None
    parts = json.loads(path.read_bytes()).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        return f"{path.name} does not say which file a weight is in (`weight_map`): copy or download it again."
    missing = sorted({part for part in parts.values() if not (path.parent / part).is_file()})
    if missing:
        return f"{path.name} names {_first(missing)}, which is not there: copy or download all parts of the model."
    return None


def _find_fault_of_weights(path: Path) -> str | None:
    """Why a file of weights cannot be read, with what to do; None where it can."""
    again = "It was saved or copied in part: copy or download it again."
    if path.stat().st_size == 0:
        return f"{path.name} is empty. {again}"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return None
        except Exception as error:  # SafetensorError is no public name in every version
            return f"{path.name} is damaged ({error}). {again}"
    if path.name.startswith("pytorch_model") and not zipfile.is_zipfile(path):
        return f"{path.name} is damaged. {again}"
    return None


def _shorten(error: Exception) -> str:
    """The message of another library, on one line of readable length."""
    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, RuntimeError)):  # whose text says little, such as a missing key
        text = f"{type(error).__name__}: {text}"
    if "Unrecognized configuration class" in text:
        found = re.search(r"class '[\w.]*?(\w+)'", text)
        return f"transformers has no such model of {found.group(1) if found else 'this kind'}."
    if "use_safetensors" in text:
        return (
            "the hub has its weights as a pickle, which can run code, and not as model.safetensors. Download it, load "
            "it with transformers, save_pretrained it, and name that directory."
        )
    if "trust_remote_code" in text:
        return (
            "it brings code of its own, and none is run from a model's directory: name a model that transformers has."
        )
    return text if len(text) <= _MAX_REASON_LENGTH else f"{text[:_MAX_REASON_LENGTH]}..."


def _without_numbers(weight: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", weight)


def _first(weights: list[str]) -> str:
    more = f" and {len(weights) - _MAX_NAMED_WEIGHTS} more" if len(weights) > _MAX_NAMED_WEIGHTS else ""
    return f"{', '.join(weights[:_MAX_NAMED_WEIGHTS])}{more}"
