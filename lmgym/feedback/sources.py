"""Rows of feedback from wherever they are, one at a time, whatever is wrong with some of them."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

from lmgym.data.files import LFS_POINTER
from lmgym.data.rows import read_rows
from lmgym.errors import InvalidArgumentError
from lmgym.feedback.parquet import iterate_parquet
from lmgym.feedback.records import Record

DATABASES = (".db", ".sqlite", ".sqlite3")  # of the labelling page
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
MAX_LINE_BYTES = 64 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed, and its name does not end in .gz",
    b"PAR1": "a Parquet file, and its name does not end in .parquet",
    b"SQLite format 3": "a database, and its name does not end in .db",
}


class Unreadable(NamedTuple):
    """A row that could not be read."""

    reason: str


class Item(NamedTuple):
    """A row and where it is: "line", 3."""

    unit: str
    number: int
    row: object


def ending_of(path: str) -> str:
    """The ending of a file's name, in lower case, that says what it is: ".jsonl" of "a.JSONL.gz"."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def iterate_items(argument: str, source: object) -> Iterator[Item]:
    """The rows of a file of JSON lines, of a Parquet file, or of whatever else `lmgym.data.rows` reads.

    Of the first two, only some rows are in memory at a time, and a bad one is an `Unreadable`.

    Args:
        argument: what the source was given as, for messages. source: where the rows are.

    Raises:
        InvalidArgumentError: for a source that cannot be read at all.
    """
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        ending = ending_of(path) if isinstance(path, str) and os.path.isfile(path) else ""
        if ending in JSON_LINES:
            yield from _json_lines(argument, path)
            return
        if ending in DATABASES:
            yield from (Item("answer", number, record) for number, record in enumerate(_answers(path), 1))
            return
        if ending == ".parquet":
            yield from (Item("row", number, row) for number, row in enumerate(iterate_parquet(argument, path), 1))
            return
    elif isinstance(source, (list, tuple)) and (not source or isinstance(source[0], Record)):
        yield from (Item("record", number, row) for number, row in enumerate(source, 1))
        return
    for number, row in enumerate(read_rows(argument, source, "prompt"), 1):
        yield Item("row", number, row.columns)


def _answers(path: str) -> Iterator[Record]:
    """The answers in a database of the labelling page, in the order in which they came."""
    from lmgym.feedback.store import Store

    with Store(path) as store:
        yield from store.records()


def _json_lines(argument: str, path: str) -> Iterator[Item]:
    """The lines of a file that are not blank, each as what JSON has there."""
    opener = gzip.open if path.lower().endswith(".gz") else open
    number = 0
    try:
        with cast(BinaryIO, opener(path, "rb")) as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if number == 1:
                    _check_start(argument, path, line)
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                    yield Item("line", number, Unreadable(f"longer than {MAX_LINE_BYTES:,} bytes"))
                    return
                if line.strip():
                    yield Item("line", number, _parse(line))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Item("line", number + 1, Unreadable(f"the compressed file is cut or damaged here: {error}"))
    except OSError as error:
        raise InvalidArgumentError(f"`{argument}` file {path!r} cannot be read: {error}.") from error


def _check_start(argument: str, path: str, line: bytes) -> None:
    if line.startswith(LFS_POINTER):
        raise InvalidArgumentError(f"`{argument}` file {path!r} is a git-lfs pointer: get the file by `git lfs pull`.")
    for start, what in _OTHER_ENCODINGS.items():
        if line.startswith(start):
            raise InvalidArgumentError(f"`{argument}` file {path!r} must be JSON lines in UTF-8, and is {what}.")


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8, at byte {error.start} of the line: save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: an int of thousands of digits too
        cut = "" if line.endswith(b"\n") else "; the file ends in the middle of this line"
        return Unreadable(f"not JSON: {error}{cut}")
