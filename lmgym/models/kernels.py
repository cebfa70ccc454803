"""Finds the kernels in `distribution_kernels.py`, where they can run."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def find_kernels(logits: Tensor) -> Any:
    """The module of kernels for logits (B, V), or None where these must be read by plain operations."""
    is_known = logits.is_cuda and logits.dtype != torch.float64 and logits.dim() == 2 and logits.stride(1) == 1
    return _load() if is_known and len(logits) else None


@functools.cache  # when first asked: an import computes nothing
def _load() -> Any:
    try:
        from lmgym.models import distribution_kernels as kernels

        return kernels if _are_right(kernels) else None
    except Exception:  # Triton is not there, or cannot compile for this GPU
        return None


def _are_right(kernels: Any) -> bool:
    """Whether kernels give what plain operations give, on a small example."""
    logits = torch.arange(5000.0, device="cuda").remainder(7).expand(2, -1)
    tokens, log_probs = kernels.draw(logits, torch.tensor([0.0, 0.999], dtype=torch.float64, device="cuda"))
    distribution = logits.log_softmax(-1)
    again, entropies, _ = kernels.log_probs_and_entropies(logits, tokens)
    expected = distribution.gather(1, tokens[:, None]).squeeze(1)
    gaps = [log_probs - expected, again - expected, entropies + (distribution.exp() * distribution).sum(-1)]
    return tokens.tolist() == [0, 4996] and bool(torch.stack(gaps).abs().max() < 1e-3)
