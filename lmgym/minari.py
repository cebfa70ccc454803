"""Episodes as a Minari data set, for offline RL. Minari itself is needed to write one.

Shapes: B episodes, P prompt columns, T response columns, L = P + T, n tokens of one episode.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmgym.episodes import Episodes
from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.files import hidden_sibling
from lmgym.kl import token_rewards
from lmgym.scores import reference_return
from lmgym.tasks.stored import StoredOptimum
from lmgym.wrappers import PolicyKL

ROOT_VARIABLE = "MINARI_DATASETS_PATH"  # the directory where Minari looks for data sets


def write_minari(
    name: str,
    episodes: Episodes,
    env: PolicyKL,
    *,
    root: str | os.PathLike[str] | None = None,
    optimum: StoredOptimum | None = None,
    progress: Callable[[int], object] | None = None,
    **about: Any,
) -> Path:
    """Writes episodes as a data set, whole or not at all: `minari.load_dataset(name)` reads it.

    An episode has n + 1 observations of the env, and n actions `Dict(token, log_prob)`. Its rewards have both halves of
    the KL: they are those of `env`, which `dataset.recover_environment()` makes again. Reset with the `options` in the
    episode's metadata, it shows the same observations and pays the same rewards for the same actions.

    Args:
        name: such as "lmgym/echo-4/reference-v0".
        episodes: B of them, of one split of one task.
        env: the token MDP that they are of, with dict observations, in `PolicyKL`.
        root: a directory of data sets, `MINARI_DATASETS_PATH` when they are loaded; None is Minari's own.
        optimum: of that split: J of the reference is then `ref_min_score`, and V* is `ref_max_score`, so that
            `minari.get_normalized_score` of a return is its share of the gain. Both are discounted by the env's gamma:
            below 1, so must the return be.
        progress: called with 1 after every episode.
        about: other metadata of `minari.create_dataset_from_buffers`: algorithm_name, description, author, ...

    Returns:
        The directory of the data set.

    Raises:
        InvalidArgumentError: for a data set that is there already.
        LmGymError: without Minari.
    """
    check_minari()
    directory = dataset_directory(name, root)
    if directory.exists():
        raise InvalidArgumentError(f"`name` must be of a data set that is not there yet, and {str(directory)!r} is.")
    scores = {}
    if optimum is not None:
        scores = {"ref_min_score": reference_return(optimum).mean, "ref_max_score": optimum.value}
    from minari import create_dataset_from_buffers

    scratch = hidden_sibling(dataset_directory(name.partition("/")[0], root), "tmp")
    try:
        with _minari_root(scratch), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that are not given
            buffers = _buffers(episodes, env, progress)
            create_dataset_from_buffers(name, buffers, env, data_format="hdf5", **scores, **about)
        _move(scratch, name, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def check_minari() -> None:
    """Raises `LmGymError` where Minari is not installed."""
    if importlib.util.find_spec("minari") is None:
        raise LmGymError("Data sets for offline RL need Minari: pip install 'lmgym[minari]'.")


def dataset_directory(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Where Minari looks for a data set; no directory is made."""
    given = root or os.environ.get(ROOT_VARIABLE) or Path.home() / ".minari" / "datasets"
    return Path(given) / name


@contextlib.contextmanager
def _minari_root(root: Path) -> Iterator[None]:
    """Has Minari look for data sets in another directory meanwhile; its functions have no argument for that."""
    before = os.environ.get(ROOT_VARIABLE)
    os.environ[ROOT_VARIABLE] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ[ROOT_VARIABLE]
        else:
            os.environ[ROOT_VARIABLE] = before


def _move(scratch: Path, name: str, directory: Path) -> None:
    """Moves a finished data set where it belongs, after the descriptions of the namespaces that it lies in."""
    for file in scratch.rglob("namespace_metadata.json"):
        target = directory.parents[name.count("/")] / file.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.move(file, target)
    directory.parent.mkdir(parents=True, exist_ok=True)
    os.rename(scratch / name, directory)


def _buffers(episodes: Episodes, env: PolicyKL, progress: Callable[[int], object] | None) -> Iterator[Any]:
    """Yields a Minari buffer an episode."""
    from minari.data_collector import EpisodeBuffer

    mdp: Any = env.unwrapped
    rewards = token_rewards(episodes, mdp.kl_coef, dense=mdp.dense_kl).double().numpy()
    for i in range(len(episodes)):
        n = int(episodes.lengths[i])
        ended = np.arange(1, n + 1) == n
        terminated = bool(episodes.terminated[i])
        yield EpisodeBuffer(
            options=_reset_options(episodes, i),
            observations=observations_of(episodes, i, mdp.engine.lm.pad_token_id),
            actions={
                "token": episodes.response_ids[i, :n].numpy(),
                "log_prob": episodes.log_probs[i, :n].double().numpy(),
            },
            rewards=rewards[i, :n],
            terminations=ended & terminated,
            truncations=ended & (not terminated),
            infos=None,
        )
        if progress is not None:
            progress(1)


def _reset_options(episodes: Episodes, row: int) -> dict[str, Any]:
    """What `env.reset(options=...)` begins an episode's prompt with: its index, or its tokens where it has none."""
    index = int(episodes.prompt_index[row])
    if index >= 0:
        return {"prompt_index": index}
    return {"prompt_ids": episodes.prompt_ids[row][episodes.prompt_mask[row]].tolist()}


def observations_of(episodes: Episodes, row: int, pad_token_id: int) -> dict[str, Any]:
    """What the env showed in an episode: `input_ids` int64 and `attention_mask` int8, (n + 1, L) each."""
    n = int(episodes.lengths[row])
    width = episodes.prompt_ids.shape[1]
    shown = np.arange(episodes.response_ids.shape[1]) < np.arange(n + 1)[:, None]
    response = np.where(shown, episodes.response_ids[row].numpy(), pad_token_id)
    prompt = np.broadcast_to(episodes.prompt_ids[row].numpy(), (n + 1, width))
    mask = np.broadcast_to(episodes.prompt_mask[row].numpy(), (n + 1, width))
    return {
        "input_ids": np.concatenate([prompt, response], axis=1),
        "attention_mask": np.concatenate([mask, shown], axis=1).astype(np.int8),
    }
