"""Reads and writes files of feedback: JSON lines, Parquet, and the layouts of TRL in either.

    for record in read_records("prefs.jsonl"): ...
    write_records("prefs.parquet", records)

Only some records are in memory at a time. A source with a bad record is refused as a whole, with a report of all that
is wrong with it, and a file is written whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

from lmgym.errors import InvalidArgumentError, LmGymError, check_choice
from lmgym.feedback.exports import LAYOUTS, Losses, Style, rows_of
from lmgym.feedback.layouts import is_labelled, record_from_labels, record_from_row, share_record
from lmgym.feedback.parquet import write_parquet
from lmgym.feedback.problems import Problems
from lmgym.feedback.records import Record
from lmgym.feedback.sources import JSON_LINES, Item, Unreadable, ending_of, iterate_items
from lmgym.files import replace_file

ENDINGS = (*JSON_LINES, ".parquet")


def read_records(source: object, argument: str = "source") -> Iterator[Record]:
    """Yields the records of a file, a list of rows or of records, a data set or a table.

    After the first bad record none is yielded any more, and at the end of the source all of them are reported. So
    whoever keeps records does it when the iterator has ended, and undoes it where it raises.

    Args:
        source: lmgym's own rows, pairs or labels (`lmgym.feedback.layouts`), in a .jsonl (and .jsonl.gz) or .parquet
            file or whatever else `lmgym.data.rows` reads.
        argument: what the source was given as, for messages.

    Raises:
        FeedbackFileError: at the end, with every record that cannot be read, and every id that comes again.
        InvalidArgumentError: for a source that cannot be read at all.
    """
    for _, record in locate_records(source, argument):
        yield record


def locate_records(source: object, argument: str = "source") -> Iterator[tuple[str, Record]]:
    """The same, each record with where it is: "line 3"."""
    problems = Problems(argument, repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "as given")
    ids: dict[bytes, int] = {}
    for items in _group_labels(iterate_items(argument, source)):
        first = items[0]
        try:
            record = _record_of(items)
            _check_id(record, first, ids)
        except (LmGymError, RecursionError) as error:
            problems.add(first.unit, first.number, str(error))
            continue
        if not problems:
            yield f"{first.unit} {first.number}", record
    problems.raise_all()


def _group_labels(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items one by one, but for neighbours with a label that share a record."""
    group: list[Item] = []
    for item in items:
        if group and is_labelled(item.row) and share_record(cast(Any, group[0].row), cast(Any, item.row)):
            group.append(item)
            continue
        if group:
            yield group
        group = [item] if is_labelled(item.row) else []
        if not group:
            yield [item]
    if group:
        yield group


def _record_of(items: list[Item]) -> Record:
    row = items[0].row
    if isinstance(row, Unreadable):
        raise InvalidArgumentError(row.reason)
    if is_labelled(row):
        return record_from_labels([cast(Any, item.row) for item in items])
    return record_from_row(row)


def _check_id(record: Record, item: Item, ids: dict[bytes, int]) -> None:
    """Raises `InvalidArgumentError` for the id of an earlier record; of each id a digest is remembered."""
    if record.id is None:
        return
    digest = hashlib.blake2b(record.id.encode(), digest_size=16).digest()
    if digest in ids:
        raise InvalidArgumentError(f"`id` {record.id!r} is that of {item.unit} {ids[digest]} too.")
    ids[digest] = item.number


def write_records(
    path: str | os.PathLike[str],
    records: Iterable[Record],
    layout: str = "records",
    *,
    chat: bool = False,
    implicit: bool = False,
    lossy: bool = False,
) -> int:
    """Writes records to a file, which appears when all of them are in it.

    Args:
        path: ends in .jsonl, .jsonl.gz or .parquet.
        records: what to write; may be an iterator.
        layout: "records" holds everything; "pairs" are rows of prompt, chosen and rejected; "labels" rows of prompt,
            completion and label; "demonstrations" rows of prompt and completion.
        chat: texts become conversations: the prompt the user's message, a completion the assistant's.
        implicit: pairs have no column for the prompt; both sides begin with it.
        lossy: leaves out what the layout cannot hold, instead of raising.

    Returns:
        The number of rows.

    Raises:
        InvalidArgumentError: for another ending, and saying all that the layout cannot hold; nothing is written then.
    """
    path = os.fspath(path)
    check_choice("layout", layout, LAYOUTS)
    ending = ending_of(path)
    if ending not in ENDINGS or (ending == ".parquet" and path.lower().endswith(".gz")):
        raise InvalidArgumentError(f"`path` must end in one of {list(ENDINGS)}, or .jsonl.gz, got {path!r}.")
    if (chat and layout == "records") or (implicit and layout != "pairs"):
        name = "chat" if chat and layout == "records" else "implicit"
        raise InvalidArgumentError(f"`{name}` must be False where `layout` is {layout!r}, got True.")
    losses = Losses()
    rows = _checked_rows(records, layout, Style(chat, implicit, ending == ".parquet"), losses)
    with replace_file(path) as file:
        count = _write_rows(path, file, rows, own=layout == "records")
        if losses.found and not lossy:
            raise InvalidArgumentError(
                f"`layout` {layout!r} cannot hold all of it: {losses}. Nothing was written: lossy=true leaves that "
                "out, and layout=records holds everything."
            )
    return count


class _Counter:
    """Counts what passes through an iterator."""

    count = 0

    def of(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self.count += 1
            yield row


def _checked_rows(records: Iterable[Record], layout: str, style: Style, losses: Losses) -> Iterator[dict[str, Any]]:
    for record in records:
        yield from rows_of(record, layout, style, losses)


def _write_rows(path: str, file: BinaryIO, rows: Iterable[dict[str, Any]], *, own: bool) -> int:
    counter = _Counter()
    if path.lower().endswith(".parquet"):
        write_parquet("path", path, file, counter.of(rows), own=own)
        return counter.count
    packed = gzip.GzipFile(fileobj=file, mode="wb", mtime=0) if path.lower().endswith(".gz") else file
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
    for row in counter.of(rows):
        packed.write(encoder.encode(row).encode() + b"\n")
    if packed is not file:
        packed.close()
    return counter.count
