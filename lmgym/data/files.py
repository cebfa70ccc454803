"""The kinds of files that rows are read from, told apart by the ending of the name, in upper or lower case.

Texts are UTF-8, with or without a byte-order mark, and with any line ends.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator

from lmgym.errors import InvalidArgumentError

Item = tuple[str, object]
"""Where an item is in its file ("line 3"), and the item: a text, or what JSON or a table has there."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_file(argument: str, path: str) -> list[Item]:
    """The items of a file: lines of text, of JSON or of CSV, or the rows of a Parquet file.

    Args:
        argument: what the file was given as, for messages. path: of the file; `.gz` after another ending is unpacked.

    Raises:
        InvalidArgumentError: naming the argument and the file, for one that cannot be read, and for an unknown ending.
    """
    if not os.path.isfile(path):
        raise InvalidArgumentError(
            f"`{argument}` must be a list of texts or rows, or a file of them, and there is no file {path!r}. "
            "A data set of the hub is given loaded: datasets.load_dataset(...)."
        )
    name = path.lower().removesuffix(".gz")
    ending = os.path.splitext(name)[1]
    if ending == ".parquet":
        return _parquet_rows(argument, path)
    if ending not in TEXT_READERS:
        raise InvalidArgumentError(
            f"`{argument}` file {path!r} must have one of the endings {sorted([*TEXT_READERS, '.parquet'])}, "
            f"got {ending!r}: .txt is a text a line, .jsonl a JSON object a line."
        )
    text = _read_text(argument, path)
    return list(TEXT_READERS[ending](f"`{argument}` file {path!r}", text))


def _read_text(argument: str, path: str) -> str:
    opener = gzip.open if path.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            data: bytes = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidArgumentError(f"`{argument}` file {path!r} cannot be read: {error}.") from error
    if data.startswith(LFS_POINTER):
        raise InvalidArgumentError(f"`{argument}` file {path!r} is a git-lfs pointer: get the file by `git lfs pull`.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidArgumentError(
            f"`{argument}` file {path!r} must be UTF-8, and line {line} is not: save it as UTF-8."
        ) from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, by their numbers from 1; only line feeds and carriage returns end one."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, line.rstrip("\n")


def _text_lines(_: str, text: str) -> Iterator[Item]:
    for number, line in _lines(text):
        yield f"line {number}", line


def _json_lines(file: str, text: str) -> Iterator[Item]:
    for number, line in _lines(text):
        yield f"line {number}", _parse_json(f"{file}, line {number},", line)


def _json_document(file: str, text: str) -> Iterator[Item]:
    """A JSON array of rows; any other .json file is read as JSON lines."""
    if not text.lstrip().startswith("["):
        yield from _json_lines(file, text)
        return
    for index, item in enumerate(_parse_json(file, text)):
        yield f"item {index}", item


def _parse_json(where: str, text: str) -> list[object]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: an int of thousands of digits too
        raise InvalidArgumentError(f"{where} is not JSON: {error}.") from error


def _table_lines(delimiter: str) -> Callable[[str, str], Iterator[Item]]:
    def read(file: str, text: str) -> Iterator[Item]:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidArgumentError(
                        f"{file}, line {reader.line_num}, must have the columns of the first line, "
                        f"{reader.fieldnames}, got {list(row.values())}."
                    )
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise InvalidArgumentError(f"{file}, line {reader.line_num}, is not CSV: {error}.") from error

    return read


def _parquet_rows(argument: str, path: str) -> list[Item]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InvalidArgumentError(
            f"`{argument}` file {path!r} needs pyarrow to be read: `pip install pyarrow`."
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's own errors have no common base
        raise InvalidArgumentError(f"`{argument}` file {path!r} is no Parquet file: {error}.") from error
    return [(f"row {index}", row) for index, row in enumerate(rows)]


TEXT_READERS: dict[str, Callable[[str, str], Iterator[Item]]] = {
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".jsonlines": _json_lines,
    ".json": _json_document,
    ".csv": _table_lines(","),
    ".tsv": _table_lines("\t"),
}
