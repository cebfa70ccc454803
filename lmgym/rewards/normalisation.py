"""The mean and the standard deviation of a reward model's scores, moved to 0 and 1 for whoever loads it.

Where the model has a bias to put the shift in, its weights change, and every tool that loads them sees the new scores.
Where it has none, as a Llama, the two numbers stand in its config, and lmgym applies them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lmgym.errors import InvalidArgumentError, check_number

CONFIG_KEY = "lmgym_score"  # of config.json: {"mean": ..., "std": ...}
_NORMS = ("ln_f", "final_layer_norm", "norm")


@torch.no_grad()
def normalise(model: Any, mean: float, std: float = 1.0) -> None:
    """Makes (score - mean) / std of the scores of a reward model, in place.

    The head of most models has no bias, so that the shift goes into the bias of the final LayerNorm: moving it by
    c * w / |w|^2 moves every score w . h by exactly c. Without either, the numbers go into the config.

    Args:
        model: A sequence-classification model with one label.
        mean: Mean of its scores on reference responses.
        std: Their standard deviation, > 0; 1 leaves the scale.
    """
    check_number("mean", mean, -math.inf)
    check_number("std", std, 0, open_low=True)
    head = score_head(model)
    bias = getattr(_final_norm(model), "bias", None)
    if getattr(model.config, CONFIG_KEY, None) is not None or (head.bias is None and bias is None):
        before_mean, before_std = read_normalisation(model.config)
        numbers = {"mean": before_mean + before_std * mean, "std": before_std * std}
        setattr(model.config, CONFIG_KEY, numbers)
        return
    head.weight /= std
    if head.bias is not None:
        head.bias.copy_((head.bias - mean) / std)
    else:
        w = head.weight[0]
        bias -= (mean / std) * w / w.dot(w)


def apply_normalisation(config: Any, scores: Tensor) -> Tensor:
    """Scores with the mean and the standard deviation in a model's config applied; as they are where it has none."""
    mean, std = read_normalisation(config)
    return scores if (mean, std) == (0.0, 1.0) else (scores - mean) / std


def read_normalisation(config: Any) -> tuple[float, float]:
    """Mean and standard deviation in the config of a model, 0 and 1 where it has none.

    Raises:
        InvalidArgumentError: for what are no such numbers.
    """
    numbers = getattr(config, CONFIG_KEY, None)
    if numbers is None:
        return 0.0, 1.0
    if not isinstance(numbers, dict) or numbers.keys() != {"mean", "std"}:
        raise InvalidArgumentError(f"`{CONFIG_KEY}` in config.json must be a mean and a std, got {numbers!r}.")
    check_number(f"{CONFIG_KEY}.mean", numbers["mean"], -math.inf)
    check_number(f"{CONFIG_KEY}.std", numbers["std"], 0, open_low=True)
    return float(numbers["mean"]), float(numbers["std"])


def score_head(model: Any) -> nn.Linear:
    """The linear layer that gives the score.

    Raises:
        InvalidArgumentError: where there is none with one output.
    """
    head = getattr(model, "score", None)
    if head is None:
        head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InvalidArgumentError(f"`model` must have a scalar linear head, and {type(model).__name__} has {head}.")
    return head


def _final_norm(model: Any) -> Any:
    norms = (getattr(model.base_model, name, None) for name in _NORMS)
    return next((norm for norm in norms if norm is not None), None)
