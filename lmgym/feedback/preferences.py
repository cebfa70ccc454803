"""The one form of preferences that training reads: ranked completions, from its own JSON lines or others' pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmgym.data.rows import Row, check_text, read_rows
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.pairs import PAIR, read_pair
from lmgym.files import write_atomically


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
        columns: what else was in the rows, such as who ranked them: (B,) values by name. Training does not read it.

    Raises:
        InvalidArgumentError: If the fields do not fit together.
    """

    prompts: Sequence[str]
    completions: Sequence[Sequence[str]]
    ranking: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "completions", tuple(tuple(texts) for texts in self.completions))
        object.__setattr__(self, "ranking", tuple(tuple(int(i) for i in order) for order in self.ranking))
        object.__setattr__(self, "columns", {name: tuple(values) for name, values in self.columns.items()})
        for name, values in self.columns.items():
            if len(values) != len(self.prompts):
                raise InvalidArgumentError(
                    f"`columns[{name!r}]` must have one value a prompt, {len(self.prompts)}, got {len(values)}."
                )
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
        lines = []
        for i, row in enumerate(zip(self.prompts, self.completions, self.ranking, strict=True)):
            columns = {name: values[i] for name, values in self.columns.items()}
            record = dict(zip(_KEYS, row, strict=True)) | columns
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomically(path, "".join(lines))

    @classmethod
    def load(cls, source: object, tokenizer: Any = None) -> Rankings:
        """Reads what `save` wrote, and pairs as others write them.

        A row has "prompt", "completions" and "ranking"; or "chosen" and "rejected", with a "prompt" or with one that
        both begin with. Those may be texts or conversations. Other columns are kept.

        Args:
            source: a file, a list of rows, a data set or a table (`lmgym.data.rows.read_rows`).
            tokenizer: the policy's. Its chat template makes conversations texts, and its EOS is put after texts of
                "chosen" and "rejected" that have none, as TRL does: they are taken to be complete.

        Raises:
            InvalidArgumentError: naming the first row that is neither.
        """
        rows = read_rows("rankings", source, "prompt")
        names = dict.fromkeys(name for row in rows for name in row.columns if name not in (*_KEYS, *PAIR))
        read = [_read(row, tokenizer) for row in rows]
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        prompts, completions, ranking = ([parts[i] for parts in read] for i in range(3))
        return cls(prompts, completions, ranking, columns)


_KEYS = ("prompt", "completions", "ranking")


def _read(row: Row, tokenizer: Any) -> tuple[Any, ...]:
    """Prompt, completions and ranking of a row."""
    if set(PAIR) <= row.columns.keys():
        prompt, chosen, rejected = read_pair("rankings", row, tokenizer)
        return prompt, (chosen, rejected), (0, 1)
    if not set(_KEYS) <= row.columns.keys():
        raise InvalidArgumentError(
            f"`rankings` must hold rows with {list(_KEYS)} or with {list(PAIR)}, and {row.location} has the columns "
            f"{list(row.columns)}."
        )
    prompt, completions, ranking = (row.columns[key] for key in _KEYS)
    if not isinstance(completions, list) or not isinstance(ranking, list):
        raise InvalidArgumentError(
            f"`rankings` must hold lists under 'completions' and 'ranking', unlike {row.location}."
        )
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ranking):
        raise InvalidArgumentError(f"`rankings` must hold integers under 'ranking', and {row.location} has {ranking}.")
    for text in (prompt, *completions):
        check_text("rankings", text, row.location, may_be_empty=True)
    return prompt, completions, ranking


def _check_texts(row: int, prompt: object, completions: Sequence[object]) -> None:
    if not isinstance(prompt, str):
        raise InvalidArgumentError(f"`prompts[{row}]` must be a str, got {prompt!r}.")
    if len(completions) < 2:
        raise InvalidArgumentError(f"`completions[{row}]` must hold at least 2 texts, got {len(completions)}.")
    for text in completions:
        if not isinstance(text, str):
            raise InvalidArgumentError(f"`completions[{row}]` must be a list of str, got {text!r} in it.")
