"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): less memory for one more forward in each backward pass.

Of each layer only the input (b, L, D) is kept. The backward pass runs the layer again, for what it needs of its inside.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from lmgym.errors import InvalidArgumentError
from lmgym.models.lean.trained import RECOMPUTES

_ATTENTION_KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


def recompute_layers(model: nn.Module) -> None:
    """Has the layers of a Hugging Face model run again in a backward pass; values and gradients stay what they are.

    Transformers' own switch needs a model in training mode, where dropout is on.

    Raises:
        InvalidArgumentError: for a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InvalidArgumentError(
            f"`gradient_checkpointing` must be False for a {type(model).__name__}, whose layers transformers does not "
            "know how to run again."
        )
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _recomputing(kind)


@functools.cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """A layer class whose forward keeps nothing but its inputs where gradients will be taken."""
    plain = kind.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(plain, self, **kwargs)
        has_cache = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))  # written once, not twice
        if has_cache or not torch.is_grad_enabled():
            return run(*args)
        # No dropout, so nothing is drawn, and no generator has to be put back.
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_same_attention)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, RECOMPUTES: True})


def _same_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a forward and of its repetitions, which may use the kernels that the forward may use now.

    They differ where gradients are taken outside of a block that asks for certain kernels, as TRPO does.
    """
    allowed = [kernel for kernel, is_enabled in _ATTENTION_KERNELS.items() if is_enabled()]
    return nullcontext(), _Kernels(allowed)


class _Kernels(AbstractContextManager[None]):
    """A block, which may be entered again, that allows these attention kernels alone."""

    def __init__(self, allowed: list[SDPBackend]) -> None:
        self._allowed = allowed
        self._blocks: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._blocks.append(sdpa_kernel(self._allowed))
        self._blocks[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._blocks.pop().__exit__(*error)
