"""Which item an annotator is asked next, and in which order its responses stand. Everything follows from a seed."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Annotated

from lmgym.errors import check_choice
from lmgym.ranges import Count, CountOrZero, Fraction, Range, check_fields

ORDERS = ("random", "disagreement")
_UpToHalf = Annotated[float, Range(0, 0.5)]
REPEAT_AFTER = 5  # items between an item and its repetition, at least


@dataclass(frozen=True)
class Plan:
    """Who is asked what.

    Attributes:
        order: "random", or "disagreement": the item with the highest number in the column `disagreement` first.
        control: the share of items that are drawn at random although `order` is "disagreement": the control group.
            Which ones does not depend on their disagreement, so that answers about them speak for all items.
        overlap: how many annotators judge an item that is shared.
        shared: the share of items that are shared; each of the others is judged by one annotator.
        gold: the share of questions with a known answer, while there are any.
        repeats: the share of questions that an annotator has answered before.
        seed: of all of it.
    """

    order: str = "random"
    control: Fraction = 0.5
    overlap: Count = 1
    shared: Fraction = 1.0
    gold: _UpToHalf = 0.1
    repeats: _UpToHalf = 0.0
    seed: CountOrZero = 0

    def __post_init__(self) -> None:
        check_choice("order", self.order, ORDERS)
        check_fields(self)

    def priority(self, key: str) -> float:
        """The place of an item in the random order, uniform on [0, 1); everybody has the same order."""
        return self._uniform("priority", key)

    def group(self, key: str) -> str:
        """What draws an item, "random" or "disagreement"."""
        is_control = self.order == "random" or self._uniform("control", key) < self.control
        return "random" if is_control else "disagreement"

    def target(self, key: str) -> int:
        """How many annotators judge an item."""
        return self.overlap if self._uniform("shared", key) < self.shared else 1

    def draw(self, annotator: str, count: int) -> Draw:
        """What an annotator is asked after `count` items."""
        rng = random.Random(f"{self.seed}:{annotator}:{count}")
        special = rng.random()
        is_gold = special < self.gold
        is_repeat = not is_gold and special < self.gold + self.repeats
        group = "random"
        if self.order == "disagreement" and rng.random() >= self.control:
            group = "disagreement"
        return Draw(is_gold, is_repeat, group, rng)

    def _uniform(self, purpose: str, key: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:{purpose}:{key}".encode()).digest()
        return (int.from_bytes(digest[:7], "big") >> 3) / 2**53


@dataclass(frozen=True)
class Draw:
    """What the next question is.

    Attributes:
        is_gold: one whose answer is known. is_repeat: one that was answered before.
        group: otherwise one of this group.
        rng: for what is left to chance.
    """

    is_gold: bool
    is_repeat: bool
    group: str
    rng: random.Random

    def shuffle(self, count: int) -> list[int]:
        """The order in which K responses are shown."""
        order = list(range(count))
        self.rng.shuffle(order)
        return order
