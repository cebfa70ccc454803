"""Can the agent do sums in words? On public checkpoints: a chat model solves problems of GSM8K, and a rule checks it.

The policy is `Qwen/Qwen2.5-0.5B-Instruct`. A response scores 1 if its last number after "####" is that of the solution
(Cobbe et al. 2021, arXiv 2110.14168), and else 0. Prompts, limits and price of a nat are those of verl's example
(volcengine/verl, `examples/data_preprocess/gsm8k.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from lmgym.data.conversations import reply_of
from lmgym.data.deferred import DeferredPrompts
from lmgym.data.rows import check_text, column
from lmgym.data.sets import read_split
from lmgym.errors import InvalidArgumentError
from lmgym.tasks import Task, register_task

DATA = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_MARKED = re.compile(r"####\s*\$?(-?[\d.,]+)", re.ASCII)


def read_problems(source: str, split: str) -> list[dict[str, Any]]:
    """Rows with a problem and the instruction as the message of a user, and the solution under `answer`.

    Args:
        source: directory or hub name of the data set. split: "train" or "test".
    """
    found = []
    for row in read_split(source, "main", split, "question"):
        question = check_text("prompts", column("prompts", row, "question"), row.location)
        answer = check_text("prompts", column("prompts", row, "answer"), row.location)
        message = {"role": "user", "content": f"{question} {INSTRUCTION}"}
        found.append({"prompt": [message], "answer": answer})
    return found


def final_number(text: str) -> Decimal | None:
    """The last number after "####", or None: 1000 of "... #### $1,000."."""
    marked = _MARKED.findall(text)
    return _parse_number(marked[-1]) if marked else None


def _parse_number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().replace(",", "").rstrip("."))
    except InvalidOperation:
        return None


class AnswerReward:
    """Verifiable reward: 1 for the number of the column `answer` after "####", 0 for any other response."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """B scores, 0 or 1.

        Args:
            prompts: not read. completions: B texts, or messages.
            columns: `answer` is read: B numbers, or solutions that end with "#### " and one.

        Raises:
            InvalidArgumentError: for an answer that is no number.
        """
        scores = []
        answers = columns.get("answer") or [None] * len(completions)
        for completion, solution in zip(completions, answers, strict=True):
            expected = final_number(str(solution))
            if expected is None:
                expected = _parse_number(str(solution))
            if expected is None:
                raise InvalidArgumentError(
                    f'`answer` must be a number, or a solution that ends with "#### " and one, got {solution!r}.'
                )
            scores.append(float(final_number(reply_of(completion)) == expected))
        return scores

    def score_range(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, float]:
        """The least and the largest score: an answer is wrong (0) or right (1)."""
        return 0.0, 1.0


PROMPTS = DeferredPrompts(DATA, ("train", "test"), read_problems)


def gsm8k() -> Task:
    """The task; it holds names, and downloads nothing."""
    return Task(
        name="gsm8k",
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward=AnswerReward(),
        prompts=PROMPTS,
        kl_coef=0.001,
        max_new_tokens=512,
    )


register_task("gsm8k", gsm8k, on_hub=True)
