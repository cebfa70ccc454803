"""What transformers calls a model's cache: `past_key_values`, and `cache` since 5.24, which warns of the old name."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

# In what a model returns.
CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_keyword(model: Any) -> str:
    """The keyword by which the `forward` of a model takes its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
