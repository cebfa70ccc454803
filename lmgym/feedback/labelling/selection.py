"""Finds the next item of an annotator in the database, and keeps count of the answers of each."""

from __future__ import annotations

import sqlite3
import time

from lmgym.feedback.labelling.plan import REPEAT_AFTER, Draw

HOLD_SECONDS = 3600.0  # an item that somebody has open counts as theirs for so long


def choose(connection: sqlite3.Connection, annotator: str, draw: Draw) -> tuple[int, int, str] | None:
    """The id of an item, its number of responses, and what chose it."""
    ordinary = _choose_new(connection, annotator, draw.group)
    if ordinary is None:
        return None
    special = None
    if draw.is_gold:
        special = _choose_gold(connection, annotator)
    elif draw.is_repeat:
        special = _choose_repeat(connection, annotator)
    return special or ordinary


def _choose_new(connection: sqlite3.Connection, annotator: str, group: str) -> tuple[int, int, str] | None:
    other = "random" if group == "disagreement" else "disagreement"
    for name in (group, other):
        found = connection.execute(
            "SELECT id, size, draw FROM items WHERE NOT is_gold AND answered < target AND draw = ?1"
            " AND NOT EXISTS (SELECT 1 FROM assignments WHERE item = items.id AND annotator = ?2)"
            " AND answered + (SELECT count(*) FROM assignments"
            " WHERE item = items.id AND verdict IS NULL AND opened > ?3) < target ORDER BY priority, id LIMIT 1",
            (name, annotator, time.time() - HOLD_SECONDS),
        ).fetchone()
        if found is not None:
            return found
    return None


def _choose_gold(connection: sqlite3.Connection, annotator: str) -> tuple[int, int, str] | None:
    return connection.execute(
        "SELECT id, size, 'gold' FROM items WHERE is_gold AND NOT EXISTS"
        " (SELECT 1 FROM assignments WHERE item = items.id AND annotator = ?) ORDER BY priority LIMIT 1",
        (annotator,),
    ).fetchone()


def _choose_repeat(connection: sqlite3.Connection, annotator: str) -> tuple[int, int, str] | None:
    """The oldest item that the annotator has judged once, and not just now."""
    last = connection.execute(
        "SELECT id FROM assignments WHERE annotator = ? ORDER BY id DESC LIMIT 1 OFFSET ?",
        (annotator, REPEAT_AFTER - 1),
    ).fetchone()
    if last is None:
        return None
    return connection.execute(
        "SELECT item, (SELECT size FROM items WHERE id = item), 'repeat' FROM assignments WHERE annotator = ?"
        " GROUP BY item HAVING count(*) = 1 AND max(verdict) = 'judged' AND max(chosen_by) <> 'gold' AND max(id) < ?"
        " ORDER BY max(id) LIMIT 1",
        (annotator, last[0]),
    ).fetchone()


def count_answer(connection: sqlite3.Connection, assignment: int, verdict: str, change: int) -> None:
    """Keeps the number of answers of an item; a skip is none, and neither is a repetition."""
    connection.execute(
        "UPDATE items SET answered = answered + ? WHERE id ="
        " (SELECT item FROM assignments WHERE id = ? AND ? <> 'skip' AND chosen_by <> 'repeat')",
        (change, assignment, verdict),
    )
