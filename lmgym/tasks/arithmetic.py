"""Can the agent learn to add? The prompt is a sum such as "12+7=", and the right digits with an EOS pay 1.

The reference is a small model that has begun to learn addition and stopped early: it sometimes finds the right sum, for
most prompts. A rule decides which sums there are, which are held out, and whether a response is right.

One token is one character: id 0 is the EOS, ids 1 to 10 are the digits "0" to "9", 11 is "+" and 12 is "=".
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lmgym.errors import InvalidArgumentError
from lmgym.tasks import Task, register_task
from lmgym.tasks.stored import ARTEFACTS

Split = Literal["train", "test"]

SYMBOLS = "0123456789+="  # ids 1 to 12
EOS_TOKEN_ID = 0
PROMPT_SEED = 20_240_301
PROMPTS_PER_SPLIT: dict[int, dict[Split, int]] = {1: {"train": 80, "test": 20}, 2: {"train": 1024, "test": 256}}
SETTINGS = tuple(PROMPTS_PER_SPLIT)  # digits of the numbers: the task of n digits is `arithmetic-n`

_TOKEN_IDS = {symbol: token for token, symbol in enumerate(SYMBOLS, start=1)}
_SUM = re.compile(r"(\d+)\+(\d+)=", re.ASCII)


def max_prompt_tokens(digits: int) -> int:
    """P: two numbers of so many digits, the plus and the equals sign."""
    return 2 * digits + 2


def max_new_tokens(digits: int) -> int:
    """T: the longest sum of two numbers of so many digits, and the EOS."""
    return digits + 2


def all_prompts(digits: int) -> tuple[str, ...]:
    """Every ordered pair of numbers from 0 to 10^digits - 1, without leading zeros: 100^digits prompts."""
    numbers = range(10**digits)
    return tuple(f"{a}+{b}=" for a in numbers for b in numbers)


@functools.cache
def prompts(digits: int, split: Split) -> tuple[str, ...]:
    """The prompts of a split: different sums, none in both splits."""
    every = all_prompts(digits)
    sizes = PROMPTS_PER_SPLIT[digits]
    order = np.random.default_rng([PROMPT_SEED, digits]).permutation(len(every))
    first = 0 if split == "train" else sizes["train"]
    return tuple(every[i] for i in order[first : first + sizes[split]])


def token_ids(text: str) -> tuple[int, ...]:
    """Token ids of a text of digits, "+" and "=", as the tokenizer beside the reference gives them."""
    return tuple(_TOKEN_IDS[symbol] for symbol in text)


def answer(prompt: str) -> str:
    """The digits of the sum that a prompt asks for.

    Raises:
        InvalidArgumentError: if the text is no sum.
    """
    match = _SUM.fullmatch(prompt)
    if match is None:
        raise InvalidArgumentError(f"`prompts` must be sums such as '12+7=', got {prompt!r}.")
    return str(int(match[1]) + int(match[2]))


class SumReward:
    """Verifiable reward: 1 for the digits of the sum followed by the EOS, 0 for any other response.

    It reads token ids, the ones that this module documents, and no text: "19" without the EOS scores 0, and so does
    "019".
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """B scores, 0 or 1.

        Args:
            prompts: B sums.
            completions: B texts, which are not read.
            columns: `completion_ids` is read: B responses as token ids, the EOS included.

        Raises:
            InvalidArgumentError: if a prompt is no sum.
        """
        responses = columns["completion_ids"]
        return [float(tuple(ids) == _accepted_response(prompt)) for prompt, ids in zip(prompts, responses, strict=True)]

    def accepted_responses(self, prompt_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The responses to a prompt that score 1, as token ids with the EOS; there is exactly one.

        Raises:
            InvalidArgumentError: if the prompt is no sum.
        """
        symbols = dict(enumerate(SYMBOLS, start=1))
        return [_accepted_response("".join(symbols.get(token, "?") for token in prompt_ids))]

    def score_range(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, float]:
        """The least and the largest score: a sum is wrong (0) or right (1)."""
        return 0.0, 1.0


@functools.lru_cache(maxsize=2**14)
def _accepted_response(prompt: str) -> tuple[int, ...]:
    return (*token_ids(answer(prompt)), EOS_TOKEN_ID)


def arithmetic(digits: int) -> Task:
    """The built-in task on numbers of up to so many digits."""
    return Task(
        name=f"arithmetic-{digits}",
        model=os.path.join(ARTEFACTS, "arithmetic", f"reference-{digits}"),
        reward=SumReward(),
        prompts={"train": prompts(digits, "train"), "test": prompts(digits, "test")},
        kl_coef=0.1,
        max_new_tokens=max_new_tokens(digits),
        max_prompt_tokens=max_prompt_tokens(digits),
    )


for _digits in SETTINGS:
    register_task(f"arithmetic-{_digits}", functools.partial(arithmetic, _digits))
