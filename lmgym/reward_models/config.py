"""The numbers of a reward model's training. This module loads neither torch nor NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmgym.errors import InvalidArgumentError
from lmgym.ranges import Count, CountOrZero, Fraction, NonNegative, Positive, check_fields

Objective = Literal["kwise", "pairwise", "plackett_luce", "regression"]
Ties = Literal["half", "davidson"]
Precision = Literal["float32", "bfloat16", "float16"]
EnsembleScore = Literal["mean", "minimum", "spread"]


@dataclass(frozen=True)
class RewardConfig:
    """How a reward model learns from feedback."""

    objective: Objective = "kwise"  # all pairs, a prompt counts once; or a pair once; whole rankings; or the ratings
    ties: Ties = "half"  # of pairs: half a preference each way, or with a probability of their own that is learned
    margin: NonNegative = 0.0  # of pairs: units of the score that a unit of strength is worth at least
    epochs: Count = 1  # passes over the prompts; more than one soon overfits (InstructGPT)
    batch_size: Count = 16  # prompts an update; all completions of a prompt are in one forward
    micro_batch_size: Count | None = None  # prompts a forward; null is the whole batch
    lr: Positive = 1e-3  # AdamW's at its peak, of small models; about 1e-5 of billions of weights, 1e-4 with LoRA
    warm_up: Fraction = 0.05  # share of the updates over which it rises; then it falls to 0 along a cosine
    weight_decay: NonNegative = 0.01
    max_grad_norm: NonNegative = 1.0  # gradients are clipped to this norm; 0 does not clip
    held_out: Fraction = 0.1  # share of the prompts that are kept for measuring, and for stopping early
    eval_every: Count | None = None  # updates between looks at the held-out prompts; null is ten looks a pass
    patience: CountOrZero = 5  # looks without a lower held-out loss that end training; 0 never does. The best stays
    centre: bool = True  # the mean score of reference samples becomes 0
    scale: bool = False  # and their standard deviation 1
    lora_rank: Count | None = None  # of an adapter, merged in the end; null trains all weights
    lora_alpha: Positive = 32.0  # its scale is alpha / rank
    precision: Precision = "float32"  # of the forwards while training (mixed precision); weights stay in float32
    ensemble: Count = 1  # reward models, each with a head and an order of its own
    ensemble_score: EnsembleScore = "mean"  # of its members' scores

    def __post_init__(self) -> None:
        check_fields(self)
        of_pairs = self.objective in ("kwise", "pairwise")
        for name, unused in (("ties", "half"), ("margin", 0)):
            value = getattr(self, name)
            if not of_pairs and value != unused:
                raise InvalidArgumentError(
                    f"`{name}` must be {unused!r} where `objective` is {self.objective!r}, which has no pairs, "
                    f"got {value!r}."
                )
        if self.held_out == 1:
            raise InvalidArgumentError("`held_out` must be below 1, or nothing is left to learn from, got 1.")
        if self.scale and not self.centre:
            raise InvalidArgumentError("`scale` must be false where `centre` is false, got true.")

    def updates(self, prompts: int) -> int:
        """How many updates so many prompts make, if training does not stop early."""
        return self.epochs * -(-prompts // self.batch_size)
