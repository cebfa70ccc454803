"""Parquet files of feedback, by pyarrow: a stated schema, written and read some thousand rows at a time."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from lmgym.errors import InvalidArgumentError

BATCH = 2_000  # rows in memory
_SPLIT = "_messages"  # ends the name of the column that a text's column has beside it for conversations
_TEXTS = ("prompt", "text")


def load_pyarrow(argument: str, path: str) -> Any:
    """The module pyarrow.

    Raises:
        InvalidArgumentError: with the line that installs it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidArgumentError(
            f"`{argument}` file {path!r} needs pyarrow: pip install 'lmgym[feedback]'."
        ) from error
    return pyarrow


# -- reading ---------------------------------------------------------------------------------------------------------


def iterate_parquet(argument: str, path: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, as JSON would have them; of lmgym's own form, with what is null left out.

    Raises:
        InvalidArgumentError: for what is no Parquet file, or one that is cut.
    """
    pyarrow = load_pyarrow(argument, path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            is_own = "completions" in file.schema_arrow.names
            others = set(file.schema_arrow.names) - set(_record_schema(pyarrow).names)
            # Older versions of pyarrow cannot iterate over a file without any rows.
            for batch in file.iter_batches(batch_size=BATCH) if file.num_row_groups else ():
                for row in batch.to_pylist():
                    yield _own_row(row, others) if is_own else _flat_row(row)
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"`{argument}` file {path!r} is no Parquet file, or is cut or damaged: {error}."
        ) from error


def _own_row(row: dict[str, Any], others: Collection[str]) -> dict[str, Any]:
    """A row with completions as the object that `lmgym.feedback.json_form` reads; `others` are not of the schema."""
    row = _without_nulls(row)
    row |= {name: _plain(row[name]) for name in others if name in row}
    for part in (row, *row.get("completions", ()), row.get("judgement", {})):
        for name in _TEXTS:
            if isinstance(part, dict) and name + _SPLIT in part:
                part[name] = part.pop(name + _SPLIT)
    if isinstance(row.get("columns"), str):
        with contextlib.suppress(ValueError):  # a text that is no JSON is refused by the record
            row["columns"] = json.loads(row["columns"])
    return row


def _flat_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of another layout; a column that is null is one that the row does not have, where that is not a value."""
    return {name: _plain(value) for name, value in row.items() if value is not None or name.endswith("_ended")}


def _without_nulls(value: Any) -> Any:
    """A value without what is null in its objects; an item of a list that is null stays."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A value with its dates as texts."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# -- writing ---------------------------------------------------------------------------------------------------------


def write_parquet(argument: str, path: str, file: BinaryIO, rows: Iterable[dict[str, Any]], *, own: bool) -> None:
    """Writes rows: objects of lmgym's own form, or flat ones, whose first rows say what columns there are.

    Args:
        argument: what the file was given as, for messages. path: its name, for messages. file: where to write.
        rows: what to write. own: they are of lmgym's own form.

    Raises:
        InvalidArgumentError: for a flat row that does not fit the columns.
    """
    pyarrow = load_pyarrow(argument, path)
    schema = _record_schema(pyarrow) if own else None
    writer = None
    try:
        for batch in _batches(rows):
            if schema is None:
                schema = _schema_of(pyarrow, batch)
            values = [_split_row(row) for row in batch] if own else batch
            _check_columns(path, values, schema)
            table = pyarrow.Table.from_pylist(values, schema=schema)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(file, schema)
            writer.write_table(table)
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(file, schema or _record_schema(pyarrow))
    except pyarrow.ArrowException as error:
        raise InvalidArgumentError(
            f"`{argument}` file {path!r} cannot hold a column whose values are of several types; a file of JSON lines "
            f"can: {error}."
        ) from error
    finally:
        if writer is not None:
            writer.close()


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _schema_of(pyarrow: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """The columns that any of these rows has; one without a value is of texts."""
    names = dict.fromkeys(name for row in rows for name in row)
    arrays = {name: pyarrow.array([row.get(name) for row in rows]) for name in names}
    types = {name: pyarrow.string() if pyarrow.types.is_null(a.type) else a.type for name, a in arrays.items()}
    return pyarrow.schema(list(types.items()))


def _check_columns(path: str, rows: Sequence[dict[str, Any]], schema: Any) -> None:
    known = set(schema.names)
    for row in rows:
        if not row.keys() <= known:
            raise InvalidArgumentError(
                f"`path` {path!r} cannot hold the columns {sorted(row.keys() - known)}, which none of the first "
                f"{BATCH:,} rows has; a file of JSON lines can."
            )


def _split_row(row: dict[str, Any]) -> dict[str, Any]:
    """An object of lmgym's own form as a row of `_record_schema`."""
    completions = [item if isinstance(item, dict) else {"text": item} for item in row["completions"]]
    split = _split_text({**row, "completions": [_split_text(item) for item in completions]})
    if "judgement" in row:
        split["judgement"] = _split_text(row["judgement"])
    if "columns" in row:
        split["columns"] = json.dumps(row["columns"], ensure_ascii=False)
    return split


def _split_text(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a row whose text, where it is a conversation, is in the column for conversations."""
    part = dict(part)
    for name in _TEXTS:
        if name in part and not isinstance(part[name], str):
            part[name + _SPLIT] = part.pop(name)
    return part


def _record_schema(pyarrow: Any) -> Any:
    """lmgym's own form; `columns` is a text of JSON, since its values may be of any type."""
    text = pyarrow.string()
    real = pyarrow.float64()
    index = pyarrow.int32()
    indices = pyarrow.list_(index)
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    completion = pyarrow.struct(
        [
            ("text", text),
            ("text_messages", messages),
            ("policy", text),
            ("sampler", text),
            ("log_prob", real),
            ("ended", pyarrow.bool_()),
        ]
    )
    judgement = pyarrow.struct(
        [
            ("kind", text),
            ("tiers", pyarrow.list_(indices)),
            ("values", pyarrow.list_(real)),
            ("low", real),
            ("high", real),
            ("preferred", index),
            ("other", index),
            ("strength", real),
            ("index", index),
            ("text", text),
            ("text_messages", messages),
            ("counts", pyarrow.list_(pyarrow.int64())),
            ("accepted", index),
            ("reason", text),
        ]
    )
    return pyarrow.schema(
        [
            ("id", text),
            ("prompt", text),
            ("prompt_messages", messages),
            ("completions", pyarrow.list_(completion)),
            ("judgement", judgement),
            ("annotator", text),
            ("time", text),
            ("seconds", real),
            ("order_shown", indices),
            ("columns", text),
        ]
    )
