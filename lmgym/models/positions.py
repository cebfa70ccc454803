"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any


def max_positions(model: Any) -> int | None:
    """Longest sequence that a Hugging Face model has positions for, in tokens; None where it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    return int(limit) - first_position(model)


def first_position(model: Any) -> int:
    """Position of a sequence's first token: 0, but in RoBERTa and its kin one more than the pad token's.

    These use the position `padding_idx` for padding and none below it, so that they have fewer positions for tokens
    than their config says.
    """
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0
