"""The one format of preferences that training reads: ranked completions, as JSON lines on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from lmgym.errors import InvalidArgumentError


@dataclass(frozen=True)
class Rankings:
    """Completions of prompts in the order in which somebody prefers them.

    `prompt + completion` is the text that was judged: a completion carries its own leading space and, where the
    response ended by itself, the EOS token as text. A response cut by the length limit has no EOS.

    Shapes: B prompts, K >= 2 completions each. Sequences are stored as tuples.

    Attributes:
        prompts: (B,) texts.
        completions: (B, K) texts.
        ranking: (B, K) indices into a prompt's completions, best first.

    Raises:
        InvalidArgumentError: If the fields do not fit together.
    """

    prompts: Sequence[str]
    completions: Sequence[Sequence[str]]
    ranking: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "completions", tuple(tuple(texts) for texts in self.completions))
        object.__setattr__(self, "ranking", tuple(tuple(int(i) for i in order) for order in self.ranking))
        if not len(self.prompts) == len(self.completions) == len(self.ranking):
            raise InvalidArgumentError(
                "`prompts`, `completions` and `ranking` must have one entry a prompt, got "
                f"{len(self.prompts)}, {len(self.completions)} and {len(self.ranking)}."
            )
        for row, (prompt, completions, order) in enumerate(
            zip(self.prompts, self.completions, self.ranking, strict=True)
        ):
            _check_texts(row, prompt, completions)
            if len(completions) != self.num_ranked:
                raise InvalidArgumentError(
                    f"`completions[{row}]` must hold {self.num_ranked} texts as the first prompt does, "
                    f"got {len(completions)}."
                )
            if sorted(order) != list(range(self.num_ranked)):
                raise InvalidArgumentError(
                    f"`ranking[{row}]` must order the indices 0 to {self.num_ranked - 1}, got {list(order)}."
                )

    def __len__(self) -> int:
        """B, the number of prompts."""
        return len(self.prompts)

    @property
    def num_ranked(self) -> int:
        """K, completions a prompt; 0 when there is no prompt."""
        return len(self.completions[0]) if self.completions else 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one JSON object a prompt; a reader never sees half a file."""
        rows = zip(self.prompts, self.completions, self.ranking, strict=True)
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                for row in rows:
                    record = dict(zip(_KEYS, row, strict=True))
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rankings:
        """Reads what `save` wrote.

        Raises:
            InvalidArgumentError: Naming the first line that is not a ranking.
        """
        with open(path, encoding="utf-8") as file:
            rows = [_parse(line, number, path) for number, line in enumerate(file, 1) if line.strip()]
        return cls([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


_KEYS = ("prompt", "completions", "ranking")


def _parse(line: str, number: int, path: str | os.PathLike[str]) -> tuple[str, list[str], list[int]]:
    """Reads one line of a file of rankings."""
    where = f"Line {number} of {os.fspath(path)!r}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{where} must be a JSON object: {error}.") from error
    if not isinstance(record, dict) or set(record) != set(_KEYS):
        raise InvalidArgumentError(f"{where} must be an object with the keys {list(_KEYS)}, got {line.strip()[:80]!r}.")
    prompt, completions, ranking = (record[key] for key in _KEYS)
    if not isinstance(completions, list) or not isinstance(ranking, list):
        raise InvalidArgumentError(f"{where} must hold lists under 'completions' and 'ranking'.")
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ranking):
        raise InvalidArgumentError(f"{where} must hold integers under 'ranking', got {ranking}.")
    return prompt, completions, ranking


def _check_texts(row: int, prompt: object, completions: Sequence[object]) -> None:
    if not isinstance(prompt, str):
        raise InvalidArgumentError(f"`prompts[{row}]` must be a str, got {prompt!r}.")
    if len(completions) < 2:
        raise InvalidArgumentError(f"`completions[{row}]` must hold at least 2 texts, got {len(completions)}.")
    for text in completions:
        if not isinstance(text, str):
            raise InvalidArgumentError(f"`completions[{row}]` must be a list of str, got {text!r} in it.")
