"""The lean forward of a model, proven equal to the model's own before it is used.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmgym.models.lean.families import describe, describe_trunk
from lmgym.models.lean.trained import TrainedTrunk, is_recomputing, read_here
from lmgym.models.lean.transformer import Transformer

if TYPE_CHECKING:
    from lmgym.models.causal import CausalLM

_PROBE_ROWS = 2
_PROBE_TOKENS = 12  # in a row
_TOLERANCE = 2e-5  # of the largest logit, in float32: another approximation of the GELU is beyond it
_COARSE_TOLERANCE = 0.2  # of the norm of all logits, in half precision, where the roundings of all layers add up
_GPU_TOLERANCE = 1e-3  # of the norm of hidden states and gradients, in float32 on a GPU
_COARSE_GRADIENT_TOLERANCE = 0.2  # the same in half precision


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
    if lm.dtype not in (torch.float32, torch.float64):
        return lean if bool((found - expected).norm() <= _COARSE_TOLERANCE * expected.norm()) else None
    gap = (found - expected).abs().max()
    return lean if bool(gap <= _TOLERANCE * expected.abs().max().clamp(min=1.0)) else None


def find_trained(lm: CausalLM) -> TrainedTrunk | None:
    """The lean forward for optimiser steps, for `lm.remember`; None where its values or gradients are not equal."""
    return _find_trained(lm.model.base_model, lm.remember(find_lean))


def find_trained_trunk(trunk: Any) -> TrainedTrunk | None:
    """The same of a model without a head."""
    return _find_trained(trunk, describe_trunk(trunk))


def _find_trained(trunk: Any, lean: Transformer | None) -> TrainedTrunk | None:
    return TrainedTrunk(lean, trunk) if lean is not None and has_equal_gradients(trunk, lean) else None


@torch.inference_mode(False)
def has_equal_gradients(trunk: Any, lean: Transformer) -> bool:
    """Whether a lean forward gives the hidden states and the gradients of a trunk, probed on rows of unlike lengths.

    Gradients are compared at norms and biases. They are small, and what reaches them has come through all that follows.
    """
    if not all(_is_known(module) for module in trunk.modules()):
        return False
    weight = lean.tokens["weight"]
    small = [x for x in trunk.parameters() if x.dim() == 1]
    is_full = weight.dtype == torch.float32
    if weight.device.type == "cpu" and not is_full:
        return False
    length = min(_PROBE_TOKENS, lean.window or _PROBE_TOKENS)
    ids = torch.arange(_PROBE_ROWS * length, device=weight.device).view(_PROBE_ROWS, length) % len(weight)
    rows = torch.tensor([0, 0, *[1] * (length - 2)], device=weight.device)
    columns = torch.tensor([length // 2 - 1, length // 2, *range(1, length - 1)], device=weight.device)

    def plain() -> Tensor:
        hidden: Tensor = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        return hidden[rows, columns]

    expected = _values_and_gradients(plain, small)
    found = _values_and_gradients(lambda: read_here(lean, ids, rows, columns), small)
    if weight.device.type != "cpu":
        return _are_alike_as_a_whole(found, expected, _GPU_TOLERANCE if is_full else _COARSE_GRADIENT_TOLERANCE)
    return all(
        bool((x - y).abs().max() <= _TOLERANCE * y.abs().max().clamp(min=1.0))
        for x, y in zip(found, expected, strict=True)
    )


def _is_known(module: nn.Module) -> bool:
    """Whether nobody has changed a module, but to have it run again in the backward pass."""
    return type(module).__module__.startswith(("transformers.", "torch.")) or is_recomputing(module)


def _are_alike_as_a_whole(found: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Whether the differences of all numbers together are small beside the numbers.

    Of a single tensor they need not be: the gradient of a key's bias is 0, and what stands there is rounding.
    """
    gap = torch.stack([(x - y).float().norm() for x, y in zip(found, expected, strict=True)]).norm()
    return bool(gap <= tolerance * torch.stack([y.float().norm() for y in expected]).norm())


@torch.enable_grad()
def _values_and_gradients(read: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Hidden states, and the gradients of a sum of them that weighs each number differently."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        hidden = read()
        weights = torch.linspace(-1.0, 1.0, hidden.numel(), device=hidden.device).view_as(hidden)
        return [hidden.detach(), *torch.autograd.grad((weights * hidden).sum(), parameters, materialize_grads=True)]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
