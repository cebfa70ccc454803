"""The names that transformers has for a model's cache: `past_key_values`, and `cache` since 5.24."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

# The field of a model's output.
CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_keyword(model: Any) -> str:
    """The keyword by which the `forward` of a model takes its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
