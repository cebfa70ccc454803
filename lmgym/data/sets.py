"""Data sets that lie in files: those of a repository on Hugging Face's hub, or of a local directory of the same layout.

Files are downloaded and read, as every other file of prompts is (`lmgym.data.files`). No code of a data set is run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lmgym.data.files import TEXT_READERS
from lmgym.data.rows import Row, read_rows
from lmgym.errors import InvalidArgumentError

TIMEOUT = 5.0  # seconds that the hub has for its first answer
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_NAMED_FILES = 8  # in a message
_ARGUMENT = "prompts"


def read_split(source: str, folder: str, split: str, key: str) -> list[Row]:
    """The rows of a split, from all files whose names begin with it: `train.jsonl.gz`, `train-00000-of-00002.parquet`.

    Args:
        source: a local directory, or the name of a data set on the hub.
        folder: where the files are inside; a local directory may have them in `data` or at its top as well.
        split: what the names of the files begin with.
        key: the column that a bare text is.

    Raises:
        InvalidArgumentError: for a data set that cannot be had, one without files of the split, and a damaged file.
    """
    directory = Path(source if os.path.isdir(source) else _download(source, folder))
    for inside in dict.fromkeys((folder, "data", "")):
        files = [path for path in sorted((directory / inside).glob(f"{split}*")) if _is_of(path, split)]
        if files:
            return [row for path in files for row in read_rows(_ARGUMENT, str(path), key)]
    found = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    named = ", ".join(found[:_MAX_NAMED_FILES]) or "no file"
    raise InvalidArgumentError(
        f"`{_ARGUMENT}` must be a data set with files such as {os.path.join(folder, split)}.parquet or "
        f"{split}.jsonl.gz, and {source!r} has {named}{', ...' if len(found) > _MAX_NAMED_FILES else ''}."
    )


def _is_of(path: Path, split: str) -> bool:
    """Whether a file holds rows of a split, and not those of one whose name only begins in the same way."""
    rest = path.name.lower().removeprefix(split)
    endings = (*TEXT_READERS, ".parquet")
    return path.is_file() and rest.removesuffix(".gz").endswith(endings) and rest[:1] in ("-", "_", ".")


def _download(name: str, folder: str) -> str:
    """The directory in the hub's cache that holds the files of a data set; only what is new is downloaded."""
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise InvalidArgumentError(
            f"`{_ARGUMENT}` must be a directory with the files of a data set, or its name on the hub, and there is no "
            f"directory {name!r}."
        )
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [f"{folder}/*"] if folder else None
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT)
        return str(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise InvalidArgumentError(
            f"`{_ARGUMENT}` must be a directory with the files of a data set, or its name on the hub, and there is no "
            f"{name!r}. Of a private one, log in first: `hf auth login`."
        ) from error
    except Exception as reason:  # whatever its network library raises, which changes with its versions
        try:
            return str(snapshot_download(name, repo_type="dataset", local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise InvalidArgumentError(
                f"`{_ARGUMENT}`: the data set {name!r} is not in the cache, and the hub cannot be asked ({reason}). "
                f"Where there is a network, `hf download {name} --repo-type dataset --local-dir DIRECTORY`; then give "
                f"the directory: `{_ARGUMENT}=DIRECTORY` in Python, `env.{_ARGUMENT}=DIRECTORY` on a command line."
            ) from error
