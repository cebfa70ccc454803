"""Activations that Hugging Face writes out in many elementwise operations, as the one kernel of the same function.

GPT-2's GELU (`gelu_new`) is eight operations, and autograd keeps what each of them read. torch has one kernel for it.
"""

from __future__ import annotations

import torch
from torch import nn

# transformers' classes that may be written out, by name: some of them live in the module of one model.
_WRITTEN_OUT = (
    "NewGELUActivation",
    "FastGELUActivation",
    "AccurateGELUActivation",
    "GELUActivation",  # with use_gelu_python
    "GELUTanh",  # with use_gelu_tanh_python
    "BloomGelu",
)
_APPROXIMATIONS = ("tanh", "none")  # the kernels of nn.GELU
_PROBE_RANGE = 20.0  # wide enough to see an activation that clips
_TOLERANCE = 1e-6  # of values and gradients in float64; some constants are written with eight digits


def fuse_activations(model: nn.Module) -> nn.Module:
    """Gives a model one kernel for each activation that is written out, where the two are the same function.

    Weights, their names and the config stay as they are, so that what is saved is the same model.

    Args:
        model: changed in place.

    Returns:
        The model.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ in _WRITTEN_OUT:
                setattr(module, name, _find_kernel(child))
    return model


def _find_kernel(activation: nn.Module) -> nn.Module:
    """The kernel of an activation's function; the activation itself where there is none."""
    for approximation in _APPROXIMATIONS:
        kernel = nn.GELU(approximate=approximation)
        if is_same_function(activation, kernel):
            return kernel
    return activation


def is_same_function(activation: nn.Module, kernel: nn.Module) -> bool:
    """Whether two elementwise functions have the same values and the same derivative, probed on a grid in float64."""
    value, slope = _probe(activation)
    kernel_value, kernel_slope = _probe(kernel)
    return _is_near(value, kernel_value) and _is_near(slope, kernel_slope)


@torch.inference_mode(False)  # a model may be loaded where gradients are off, in either way
@torch.enable_grad()
def _probe(function: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and derivatives of an elementwise function on a grid."""
    x = torch.linspace(-_PROBE_RANGE, _PROBE_RANGE, 4001, dtype=torch.float64, requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def _is_near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0.0, atol=_TOLERANCE)
