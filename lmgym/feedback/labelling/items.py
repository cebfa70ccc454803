"""Items to label as rows of the database."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from lmgym.errors import InvalidArgumentError
from lmgym.feedback.json_form import record_to_json
from lmgym.feedback.labelling.answers import MAX_RESPONSES, to_ranks
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.records import Record


def item_key(record: Record) -> str:
    """The id of a record, or one made of its texts."""
    if record.id is not None:
        return record.id
    return hashlib.sha256(json.dumps(texts_of(record)).encode()).hexdigest()[:16]


def texts_of(record: Record) -> list[Any]:
    """The prompt and the responses: what makes two items the same."""
    return [record.prompt, [completion.text for completion in record.completions]]


def item_row(record: Record, key: str, plan: Plan, gold: bool, column: str, where: str) -> dict[str, Any]:
    """The row of an item by the names of its columns.

    Args:
        record: the item. key: its id. plan: who is asked what.
        gold: whether its judgement is the known answer.
        column: the number that the order "disagreement" goes by.
        where: it stands, for messages.

    Raises:
        InvalidArgumentError: for an item that the page cannot show, or the plan not draw.
    """
    size = len(record.completions)
    if size > MAX_RESPONSES:
        raise InvalidArgumentError(f"`completions` must be {MAX_RESPONSES} at most, got {size} in {where}.")
    if gold and (record.judgement is None or to_ranks(record, record.judgement) is None):
        raise InvalidArgumentError(f"`gold` must hold judgements that order responses, and {where} has none.")
    if not gold:
        record = replace(record, judgement=None, annotator=None, time=None, seconds=None, order_shown=None)
    group = plan.group(key)
    priority = plan.priority(key)
    if group == "disagreement" and not gold:
        value = record.columns.get(column)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidArgumentError(
                f"`columns[{column!r}]` must be a number for this order, got {value!r} in {where}."
            )
        priority = -float(value)
    text = json.dumps(record_to_json(record), ensure_ascii=False)
    row = {"key": key, "record": text, "is_gold": gold, "size": size, "draw": group, "priority": priority}
    return row | {"target": plan.target(key)}
