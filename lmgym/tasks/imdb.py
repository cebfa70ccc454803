"""Can the agent write kindly of films? On public checkpoints: GPT-2 goes on with reviews of IMDB.

The policy is `lvwerra/gpt2-imdb`, and the score is the probability that `lvwerra/distilbert-imdb` gives to "positive",
of the first half of a review and what follows. Splits, prompts and score are those of RL4LMs (Ramamurthy et al. 2023,
arXiv 2210.01241; allenai/RL4LMs, `IMDB` and `LearnedRewardFunction`): the policy reads the last 64 tokens of the half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmgym.data.deferred import DeferredPrompts
from lmgym.data.rows import check_text, column
from lmgym.data.sets import read_split
from lmgym.errors import InvalidArgumentError
from lmgym.rewards.reading import ModelReward
from lmgym.tasks import Task, register_task

if TYPE_CHECKING:
    from lmgym.rewards.classifier import ClassifierReward

DATA = "stanfordnlp/imdb"
SEED = 42  # of RL4LMs, which shuffles by `datasets`: that is a permutation of NumPy's default generator
TRAINED = 0.8  # of the reviews for training; the others are the split "validation"
TESTED = 5000  # of the reviews for testing


def read_reviews(source: str, split: str) -> list[dict[str, str]]:
    """Rows with the first half of a review as prompt, and as the column `review`, which is not cut.

    Args:
        source: directory or hub name of the data set. split: "train", "validation" or "test".
    """
    rows = read_split(source, "plain_text", "test" if split == "test" else "train", "text")
    order = np.random.default_rng(SEED).permutation(len(rows))
    trained = int(TRAINED * len(rows))
    chosen = {"train": order[:trained], "validation": order[trained:], "test": order[:TESTED]}[split]
    found = []
    for i in chosen:
        words = check_text("prompts", column("prompts", rows[i], "text"), rows[i].location).split(" ")
        half = " ".join(words[: len(words) // 2])
        if half.strip():
            found.append({"prompt": half, "review": half})
    return found


class PositiveProbability:
    """The probability, in [0, 1], that a sentiment classifier gives to its label 1.

    It reads the text before the response from the column `review` where there is one, else the prompt. Of a text that
    is longer than the classifier has positions for, it reads the end.
    """

    def __init__(self, classifier: ClassifierReward) -> None:
        from lmgym.models.positions import max_positions

        self._classifier = classifier
        self._limit = max_positions(classifier.model)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """B probabilities."""
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InvalidArgumentError("`prompts` of this task must be texts, got conversations.")
        reviews = columns.get("review") or [None] * len(prompts)
        texts = []
        for review, prompt, completion in zip(reviews, prompts, completions, strict=True):
            texts.append(self._keep_end((review or prompt) + completion))
        log_odds = self._classifier(texts, [""] * len(texts))
        return [1 / (1 + math.exp(-x)) for x in log_odds]

    def _keep_end(self, text: str) -> str:
        from lmgym.models.texts import find_start_of_last

        if self._limit is None:
            return text
        tokenizer = self._classifier.tokenizer
        room = self._limit - tokenizer.num_special_tokens_to_add()
        return text[find_start_of_last(tokenizer, text, room) or 0 :]

    def score_range(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[float, float]:
        """The least and the largest score."""
        return 0.0, 1.0


PROMPTS = DeferredPrompts(DATA, ("train", "validation", "test"), read_reviews)


def imdb() -> Task:
    """The task; it holds names, and downloads nothing."""
    return Task(
        name="imdb",
        model="lvwerra/gpt2-imdb",
        reward=ModelReward("lvwerra/distilbert-imdb", PositiveProbability),
        prompts=PROMPTS,
        kl_coef=0.1,
        max_new_tokens=48,
        max_prompt_tokens=64,
        on_long="truncate_left",
    )


register_task("imdb", imdb, on_hub=True)
