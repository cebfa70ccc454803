"""Items to label, who was asked what, and every answer, in one SQLite file.

Each change is one transaction, on the disk when the call returns (write-ahead log, `synchronous=FULL`): an answer that
was acknowledged is there after a crash. Several threads may share a `Store`, and several processes a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.json_form import judgement_from_json, judgement_to_json, record_from_json
from lmgym.feedback.labelling.assignment import SELECT, Assignment, read_assignment, read_judgements, to_records
from lmgym.feedback.labelling.database import Database, connect
from lmgym.feedback.labelling.items import item_key, item_row, texts_of
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.labelling.selection import choose, count_answer
from lmgym.feedback.records import Judgement, Record, now

COLUMN = "disagreement"


class AlreadyAnsweredError(InvalidArgumentError):
    """The item has another answer already."""


@dataclass(frozen=True)
class Progress:
    """How many items an annotator has done, and can still do; how many answers there are of all, and shall be."""

    done: int
    left: int
    answers: int
    wanted: int


class Store:
    """The file of a labelling project.

    Args:
        path: of the SQLite file.
        create: whether to make one where there is none.

    Raises:
        InvalidArgumentError: for a file that is missing, or is no file of labels.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        self._is_new = not self.path.exists()
        self._database = Database(self.path, create=create)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes the file; one that was made here goes away where an error came before there was an item in it."""
        is_left_over = kind is not None and self._is_new and self.num_items() == 0
        self.close()
        if is_left_over:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    # -- items --------------------------------------------------------------------------------------------------------

    def add_items(self, records: Iterable[Record], plan: Plan, *, gold: bool = False, column: str = COLUMN) -> int:
        """Adds what shall be labelled, all or nothing; an item that is there already keeps its answers.

        Args:
            records: the items; a judgement of theirs is left out, unless they are gold.
            plan: who is asked what.
            gold: whether their judgement is the known answer of a question for quality.
            column: the number that `plan.order` "disagreement" goes by.

        Returns:
            How many were new.

        Raises:
            InvalidArgumentError: naming the first item that cannot be labelled.
        """
        added = 0
        with self._database.transaction() as connection:
            for number, record in enumerate(records, start=1):
                key = item_key(record)
                where = f"item {number} ({key!r})"
                row = item_row(record, key, plan, gold, column, where)
                known = connection.execute("SELECT record, is_gold FROM items WHERE key = ?", (key,)).fetchone()
                if known is None:
                    marks = ", ".join("?" * len(row))
                    connection.execute(f"INSERT INTO items ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
                    added += 1
                elif known[1] != gold or texts_of(record_from_json(json.loads(known[0]))) != texts_of(record):
                    raise InvalidArgumentError(
                        f"`labels` must be a file about the same items, and {where} has other texts in "
                        f"'{self.path}'. Take another file."
                    )
                else:
                    update = "UPDATE items SET record = ?, draw = ?, priority = ?, target = ? WHERE key = ?"
                    values = [row[name] for name in ("record", "draw", "priority", "target", "key")]
                    connection.execute(update, values)
        return added

    # -- asking and answering -----------------------------------------------------------------------------------------

    def next(self, annotator: str, plan: Plan) -> Assignment | None:
        """What an annotator is asked now: what is open already, else something new; None where nothing is left."""
        with self._database.transaction() as connection:
            found = connection.execute(
                "SELECT id FROM assignments WHERE annotator = ? AND verdict IS NULL ORDER BY id LIMIT 1", (annotator,)
            ).fetchone()
            if found is not None:
                connection.execute("UPDATE assignments SET opened = ? WHERE id = ?", (time.time(), found[0]))
                return self._read(found[0])
            count = "SELECT count(*) FROM assignments WHERE annotator = ?"
            draw = plan.draw(annotator, *connection.execute(count, (annotator,)).fetchone())
            chosen = choose(connection, annotator, draw)
            if chosen is None:
                return None
            item, size, chosen_by = chosen
            added = connection.execute(
                "INSERT INTO assignments (annotator, item, chosen_by, shown, opened) VALUES (?, ?, ?, ?, ?)",
                (annotator, item, chosen_by, json.dumps(draw.shuffle(size)), time.time()),
            )
            return self._read(added.lastrowid or 0)

    def get(self, annotator: str, assignment: int) -> Assignment:
        """An assignment of an annotator.

        Raises:
            InvalidArgumentError: where there is none.
        """
        found = self._read(assignment)
        if found is None or found.annotator != annotator:
            raise InvalidArgumentError(f"`assignment` must be one of {annotator!r}, got {assignment}.")
        return found

    def answer(
        self, annotator: str, assignment: int, verdict: str, judgements: Sequence[Judgement] = (), seconds: float = 0
    ) -> None:
        """Stores an answer. The same answer again changes nothing: a page that heard no reply may send it twice.

        Raises:
            AlreadyAnsweredError: for another answer to what is answered.
        """
        text = json.dumps([judgement_to_json(judgement) for judgement in judgements], ensure_ascii=False)
        with self._database.transaction() as connection:
            before = self.get(annotator, assignment)
            if before.verdict is not None:
                if (before.verdict, before.judgements) == (verdict, tuple(judgements)):
                    return
                raise AlreadyAnsweredError("This item has an answer already. Undo brings it back.")
            connection.execute(
                "UPDATE assignments SET verdict = ?, judgements = ?, seconds = ?, time = ?,"
                " number = (SELECT coalesce(max(number), 0) + 1 FROM assignments) WHERE id = ?",
                (verdict, text, seconds, now(), assignment),
            )
            count_answer(connection, assignment, verdict, 1)

    def undo(self, annotator: str) -> bool:
        """Takes the last answer of an annotator back, who is then asked again; it stays in the table `withdrawn`.

        Returns:
            Whether there was one.
        """
        with self._database.transaction() as connection:
            last = connection.execute(
                "SELECT id, verdict, judgements, seconds, time FROM assignments"
                " WHERE annotator = ? AND verdict IS NOT NULL ORDER BY number DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if last is None:
                return False
            connection.execute("INSERT INTO withdrawn VALUES (?, ?, ?, ?, ?, ?)", (*last, now()))
            connection.execute(
                "UPDATE assignments SET verdict = NULL, judgements = NULL, seconds = NULL, time = NULL, number = NULL"
                " WHERE id = ?",
                last[:1],
            )
            count_answer(connection, last[0], last[1], -1)
            return True

    def withdrawn(self, assignment: int) -> tuple[tuple[Judgement, ...], float]:
        """What was said of an assignment before it was undone, and the seconds it took; nothing if it never was."""
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT judgements, seconds FROM withdrawn WHERE assignment = ? ORDER BY rowid DESC LIMIT 1",
                (assignment,),
            ).fetchone()
        return ((), 0.0) if found is None else (read_judgements(found[0]), found[1])

    # -- reading ------------------------------------------------------------------------------------------------------

    def progress(self, annotator: str) -> Progress:
        """How far an annotator is, and all of them together."""
        with self._database.reading() as connection:
            run = connection.execute
            (done,) = run(
                "SELECT count(*) FROM assignments WHERE annotator = ? AND verdict IS NOT NULL", (annotator,)
            ).fetchone()
            (left,) = run(
                "SELECT count(*) FROM items WHERE NOT is_gold AND answered < target AND NOT EXISTS"
                " (SELECT 1 FROM assignments WHERE item = items.id AND annotator = ?)",
                (annotator,),
            ).fetchone()
            (opened,) = run(
                "SELECT count(*) FROM assignments WHERE annotator = ? AND verdict IS NULL", (annotator,)
            ).fetchone()
            (answers, wanted) = run(
                "SELECT coalesce(sum(min(answered, target)), 0), coalesce(sum(target), 0) FROM items WHERE NOT is_gold"
            ).fetchone()
        return Progress(done, left + opened, answers, wanted)

    def assignments(self) -> Iterator[Assignment]:
        """Every answer, in the order in which they came, one at a time; gold questions and repetitions too."""
        with contextlib.closing(connect(self.path)) as connection:
            for row in connection.execute(f"{SELECT} WHERE a.verdict IS NOT NULL ORDER BY a.number"):
                yield read_assignment(row)

    def gold(self) -> dict[str, Judgement]:
        """The known answers by the id of their item."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT key, record FROM items WHERE is_gold").fetchall()
        return {key: judgement_from_json(json.loads(record)["judgement"]) for key, record in rows}

    def records(self, *, checks: bool = False) -> Iterator[Record]:
        """Every answer as records, one a judgement, in the order in which they came.

        Args:
            checks: whether to give gold questions and repetitions as well; `columns["labelling"]` tells which it is.
        """
        for answer in self.assignments():
            if answer.chosen_by not in ("gold", "repeat") or checks:
                yield from to_records(answer, self._database.id)

    def num_items(self) -> int:
        """How many items there are to label, without gold questions."""
        with self._database.reading() as connection:
            (count,) = connection.execute("SELECT count(*) FROM items WHERE NOT is_gold").fetchone()
        return int(count)

    def num_answers(self) -> int:
        """How many answers there are, gold questions and repetitions too."""
        with self._database.reading() as connection:
            (count,) = connection.execute("SELECT count(*) FROM assignments WHERE verdict IS NOT NULL").fetchone()
        return int(count)

    def _read(self, assignment: int) -> Assignment | None:
        with self._database.reading() as connection:
            row = connection.execute(f"{SELECT} WHERE a.id = ?", (assignment,)).fetchone()
        return None if row is None else read_assignment(row)
