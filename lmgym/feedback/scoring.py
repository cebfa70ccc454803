"""The hidden scores that simulated annotators judge by: a task's, a function's, or those in a column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lmgym.data.prompts import PromptText
from lmgym.errors import InvalidArgumentError, shorten
from lmgym.feedback.records import Record
from lmgym.feedback.rendering import render_record
from lmgym.rewards.base import import_function, score
from lmgym.tasks.registry import make_task

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

BATCH = 64  # records that are scored at once
Scored = tuple[Record, Sequence[float]]


def score_records(records: Iterable[Record], task: str = "", by: str = "") -> Iterator[Scored]:
    """Yields records with the scores of their completions.

    Args:
        records: what is scored.
        task: whose gold reward, or reward where it has none, gives the scores; "" is the one that a record names in its
            column "task".
        by: a reward function "package.module:function" that gives them, or a column with K numbers; "" for the task's.

    Raises:
        InvalidArgumentError: for a record that has neither.
    """
    if by and task:
        raise InvalidArgumentError("`task` and `score` must not both be given.")
    if by and ":" not in by:
        yield from ((record, _scores_of(record, by, number)) for number, record in enumerate(records, 1))
        return
    scorers: dict[str, Callable[[Sequence[Record]], list[Scored]]] = {}
    for name, batch in _batches(records, task or by):
        if name not in scorers:
            scorers[name] = _score_by_function(name) if by else _score_by_task(name)
        yield from scorers[name](batch)


def _batches(records: Iterable[Record], name: str) -> Iterator[tuple[str, list[Record]]]:
    """Neighbouring records that are scored alike, at most `BATCH`, with the name of what scores them."""
    batch: list[Record] = []
    before = name
    for number, record in enumerate(records, 1):
        own = name or record.columns.get("task")
        if not isinstance(own, str):
            raise InvalidArgumentError(
                f"`task` or `score` must be given, since record {number} does not name a task in its column 'task': "
                "task=reviews, or score=package.module:function, or score=COLUMN with a number for each completion."
            )
        if batch and (own != before or len(batch) == BATCH):
            yield before, batch
            batch = []
        batch.append(record)
        before = own
    if batch:
        yield before, batch


def _scores_of(record: Record, column: str, number: int) -> Sequence[float]:
    values = record.columns.get(column)
    if not isinstance(values, list | tuple) or len(values) != len(record.completions):
        raise InvalidArgumentError(
            f"`score` must be a column with a number for each completion, or package.module:function, and record "
            f"{number} has {shorten(values)} under {column!r}."
        )
    return values


def _score_by_function(path: str) -> Callable[[Sequence[Record]], list[Scored]]:
    """Scores by a reward function, which gets texts and the columns of the records."""
    reward = import_function(path)

    def score_batch(records: Sequence[Record]) -> list[Scored]:
        prompts = []
        completions = []
        for record in records:
            texts = render_record("source", record, None, f"record {record.id!r}")
            for completion in texts.completions:
                prompts.append(PromptText(str(texts.prompt), record.columns))
                completions.append(str(completion.text))
        return _split(records, score(reward, list(prompts), completions))

    return score_batch


def _score_by_task(name: str) -> Callable[[Sequence[Record]], list[Scored]]:
    """Scores by the gold reward of a task, which gets what its environments give it."""
    task = make_task(name)
    lm: CausalLM = task.reference()
    reward: Any = task.gold or task.reward_function()

    def score_batch(records: Sequence[Record]) -> list[Scored]:
        prompts = []
        prompt_ids = []
        response_ids = []
        for record in records:
            texts = render_record("source", record, lm.tokenizer, f"record {record.id!r}")
            ids = lm.encode(str(texts.prompt))
            for completion in texts.completions:
                prompts.append(PromptText(str(texts.prompt), record.columns))
                prompt_ids.append(list(ids))
                response_ids.append(lm.encode_response(str(texts.prompt), ids, str(completion.text)))
        completions = lm.completions(prompt_ids, response_ids)
        columns = {"prompt_ids": prompt_ids, "completion_ids": response_ids}
        return _split(records, score(reward, list(prompts), completions, **columns))

    return score_batch


def _split(records: Sequence[Record], scores: Sequence[float]) -> list[Scored]:
    """The scores of all completions, record by record."""
    scored = []
    start = 0
    for record in records:
        end = start + len(record.completions)
        scored.append((record, scores[start:end]))
        start = end
    return scored
