"""Prompts of a data set that is read when it is first asked for: naming a task downloads nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from lmgym.data.prompts import read_prompts
from lmgym.errors import InvalidArgumentError

Read = Callable[[str, str], Iterable[Mapping[str, Any]]]
"""`read(source, split)`: the rows of a split, each with a "prompt", from a directory or the name of a data set."""


class DeferredPrompts(Mapping[str, Sequence[str]]):
    """The prompts of each split, read once and shared by all tasks on one source and model while one of them lives.

    Args:
        source: directory or hub name of the data set.
        splits: their names.
        read: gives the rows of a split.
        model: whose chat template makes texts of conversations, or None; it tells one reading from another.
        tokenizer: loads that model's tokenizer.
    """

    def __init__(
        self,
        source: str,
        splits: Sequence[str],
        read: Read,
        model: object = None,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self.source = source
        self._splits = tuple(splits)
        self._read = read
        self._model = model
        self._tokenizer = tokenizer
        self._texts: dict[str, tuple[str, ...]] = {}

    def __getitem__(self, split: str) -> Sequence[str]:
        if split not in self._splits:
            raise KeyError(split)
        if split not in self._texts:
            rows = list(self._read(self.source, split))
            once = None if self._tokenizer is None else functools.cache(self._tokenizer)
            self._texts[split] = read_prompts(rows, f"prompts[{split!r}]", once)
        return self._texts[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def __contains__(self, split: object) -> bool:
        return split in self._splits  # that of Mapping would read it

    __eq__ = object.__eq__  # that of Mapping would read all of both
    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> DeferredPrompts:
        return self  # gymnasium copies the arguments of an environment once a wrapper

    def __repr__(self) -> str:
        return f"DeferredPrompts({self.source!r}, {list(self._splits)})"

    def of_model(self, model: object, load_tokenizer: Callable[[object], Any]) -> DeferredPrompts:
        """The same data set for another model, whose template conversations are written in.

        Args:
            model: it. load_tokenizer: gives the tokenizer of a model.
        """
        if model == self._model:
            return self
        return self._held(self.source, model, functools.partial(load_tokenizer, model))

    def at(self, directory: str | os.PathLike[str]) -> DeferredPrompts:
        """The same data set from a local directory.

        Raises:
            InvalidArgumentError: where there is no such directory.
        """
        path = os.fspath(directory)
        if not os.path.isdir(path):
            raise InvalidArgumentError(
                f"`prompts` must be a directory with the files of {self.source}, a file of prompts, or a list of them, "
                f"and there is no {path!r}."
            )
        return self._held(path, self._model, self._tokenizer)

    def _held(self, source: str, model: object, tokenizer: Callable[[], Any] | None) -> DeferredPrompts:
        key = (source, _state(source), self._read, self._splits, model)
        held = _HELD.get(key)
        if held is None:
            held = _HELD[key] = DeferredPrompts(source, self._splits, self._read, model, tokenizer)
        return held


_HELD: WeakValueDictionary[Any, DeferredPrompts] = WeakValueDictionary()


def _state(source: str) -> tuple[Any, ...]:
    """What tells the files of a directory from later ones of the same names."""
    if not os.path.isdir(source):
        return ()
    paths = (os.path.join(directory, name) for directory, _, names in os.walk(source) for name in names)
    return tuple(sorted((path, os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in paths))
