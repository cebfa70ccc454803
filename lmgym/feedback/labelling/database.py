"""The SQLite file of a labelling project: its tables, and one transaction at a time."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from lmgym.errors import InvalidArgumentError

APPLICATION_ID = 0x6C6D6779  # "lmgy": tells our files from other databases
VERSION = 1

_SCHEMA = """
CREATE TABLE items (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    record TEXT NOT NULL,
    is_gold INTEGER NOT NULL,
    size INTEGER NOT NULL,
    draw TEXT NOT NULL,                  -- the group that draws it, "random" or "disagreement"
    priority REAL NOT NULL,              -- within the group, the lowest first
    target INTEGER NOT NULL,             -- how many annotators shall judge it
    answered INTEGER NOT NULL DEFAULT 0  -- how many have
);
CREATE INDEX open_items ON items (draw, priority) WHERE NOT is_gold AND answered < target;
CREATE TABLE assignments (
    id INTEGER PRIMARY KEY,
    annotator TEXT NOT NULL,
    item INTEGER NOT NULL REFERENCES items (id),
    chosen_by TEXT NOT NULL,             -- "random", "disagreement", "gold" or "repeat"
    shown TEXT NOT NULL,
    opened REAL NOT NULL,
    verdict TEXT,                        -- NULL while nobody has answered
    judgements TEXT,
    seconds REAL,
    time TEXT,
    number INTEGER UNIQUE                -- of the answer, in the order in which they came
);
CREATE INDEX assigned_to ON assignments (annotator, item);
CREATE INDEX assigned_items ON assignments (item);
CREATE TABLE withdrawn (assignment INTEGER, verdict TEXT, judgements TEXT, seconds REAL, time TEXT, undone TEXT);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


def connect(path: Path) -> sqlite3.Connection:
    """A connection whose transactions are on the disk when they end."""
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


class Database:
    """A connection that threads share.

    Args:
        path: of the file.
        create: whether to make one where there is none.

    Raises:
        InvalidArgumentError: for a file that is missing, or is no file of labels.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        if not create and not path.is_file():
            raise InvalidArgumentError(f"`labels` must be a file of labels, and there is none at '{path}'.")
        self._lock = threading.RLock()
        try:
            self._connection = connect(path)
            self._prepare()
        except sqlite3.Error as error:
            raise InvalidArgumentError(f"`labels` must be a file of labels, got '{path}': {error}.") from error

    def _prepare(self) -> None:
        with self.transaction() as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application == 0 and tables == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute("INSERT INTO settings VALUES ('id', ?)", (secrets.token_hex(4),))
            elif application != APPLICATION_ID:
                raise InvalidArgumentError(f"`labels` must be a file of labels, got another database, '{self.path}'.")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                raise InvalidArgumentError(
                    f"`labels` must be a file of version {VERSION}, got version {version}, '{self.path}'."
                )
            (self.id,) = connection.execute("SELECT value FROM settings WHERE name = 'id'").fetchone()

    def close(self) -> None:
        """Closes the file; SQLite then moves what is in the log into it."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone."""
        with self._lock:
            yield self._connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection in a transaction, which is undone where anything fails."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
