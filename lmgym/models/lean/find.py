"""The lean forward of a model, proven equal to the model's own before it is used.

Shapes: V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lmgym.models.lean.families import describe
from lmgym.models.lean.transformer import Transformer

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

_PROBE_ROWS = 2
_PROBE_TOKENS = 12  # in a row
_TOLERANCE = 2e-5  # of the largest logit, in float32: another approximation of the GELU is beyond it
_COARSE_TOLERANCE = 5e-2  # the same in half precision


@torch.no_grad()
def find_lean(lm: CausalLM) -> Transformer | None:
    """The lean forward of a model, for `lm.remember`; None where there is none that gives what the model gives."""
    lean = describe(lm.model)
    if lean is None:
        return None
    length = min(_PROBE_TOKENS, lm.max_positions or _PROBE_TOKENS, lean.window or _PROBE_TOKENS)
    count = _PROBE_ROWS * length
    spread = torch.arange(count, device=lm.device) * max(1, lm.vocab_size // count)
    ids = (spread % lm.vocab_size).view(_PROBE_ROWS, length)
    expected = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    try:
        hidden, _ = lean.read(ids)
        found = lean.logits(hidden.flatten(0, 1), lm.embedded).view(*ids.shape, -1).float()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return None
    is_full = lm.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE if is_full else _COARSE_TOLERANCE
    gap = (found - expected).abs().max()
    return lean if bool(gap <= tolerance * expected.abs().max().clamp(min=1.0)) else None
