"""The parts of a transformer, as functions of the weights that a Hugging Face module holds now.

Each part keeps the dict in which its module keeps its parameters: a weight that is replaced is found there too.

Shapes: n tokens, a inputs, b outputs, H heads, h width of a head, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from lmgym.models.lean.products import affine, affine_gelu

Function = Callable[[Tensor], Tensor]


class UnknownPartError(Exception):
    """A module that has no part here: the model runs as it is."""


@dataclass(frozen=True)
class Linear:
    """x (n, a) -> (n, b). `transposed`: whether the weight is stored as (b, a)."""

    parameters: dict[str, Any]
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module) -> Linear:
        """The part of a linear layer, and of no subclass, which might do more."""
        if type(module) not in (nn.Linear, Conv1D):
            raise UnknownPartError(type(module).__name__)
        return cls(module._parameters, type(module) is nn.Linear)

    @property
    def weight(self) -> Tensor:
        """(a, b)."""
        weight: Tensor = self.parameters["weight"]
        return weight.t() if self.transposed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(n, b) of x (n, a)."""
        return affine(x, self.weight, self.parameters["bias"])

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """The GELU of what it gives."""
        return affine_gelu(x, self.weight, self.parameters["bias"], approximate)


@dataclass(frozen=True)
class Norm:
    """Layer normalisation, or that by the root mean square, over the last dimension."""

    parameters: dict[str, Any]
    eps: float
    by_root_mean_square: bool

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """The part of `nn.LayerNorm`, or of a module with the weight and epsilon of a Llama's."""
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.elementwise_affine:
            return cls(module._parameters, module.eps, by_root_mean_square=False)
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            return cls(module._parameters, float(module.variance_epsilon), by_root_mean_square=True)  # type: ignore[arg-type]
        raise UnknownPartError(type(module).__name__)

    def __call__(self, x: Tensor) -> Tensor:
        """Numbers of the same shape."""
        weight = self.parameters["weight"]
        x = x.to(weight.dtype)  # coarser under autocast
        if self.by_root_mean_square:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.parameters["bias"], self.eps)


def gelu_kind(activation: Any) -> str | None:
    """How an activation approximates the GELU, as `torch.nn.GELU` takes it; None of another function."""
    if isinstance(activation, (NewGELUActivation, GELUTanh)):
        return "tanh"
    if isinstance(activation, nn.GELU):
        return activation.approximate
    # transformers' own GELU, whose `act` is torch's function, or the function written out.
    return "none" if type(activation).__name__ == "GELUActivation" and activation.act is F.gelu else None


@dataclass(frozen=True)
class MLP:
    """Two layers with an activation between."""

    up: Linear
    down: Linear
    activation: Function

    def inner(self, x: Tensor) -> Tensor:
        """What the second layer reads, of x (n, D)."""
        kind = gelu_kind(self.activation)
        return self.activation(self.up(x)) if kind is None else self.up.gelu(x, kind)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, D) of x (n, D)."""
        return self.down(self.inner(x))


@dataclass(frozen=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Function

    def inner(self, x: Tensor) -> Tensor:
        """What the last layer reads, of x (n, D)."""
        return self.activation(self.gate(x)).mul_(self.up(x))

    def __call__(self, x: Tensor) -> Tensor:
        """(n, D) of x (n, D)."""
        return self.down(self.inner(x))


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) at frequencies that do not depend on the length."""

    buffers: dict[str, Any]
    scaling: float

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(n, 1, r) cosine and signed sine for the first r numbers of a head, of positions (n,)."""
        frequencies = self.buffers["inv_freq"].to(positions.device, torch.float32)
        angles = positions.unsqueeze(1).float() * frequencies
        cosine = angles.cos() * self.scaling
        sine = angles.sin() * self.scaling
        both = torch.cat([cosine, cosine], -1)
        signed = torch.cat([-sine, sine], -1)
        return both.to(dtype).unsqueeze(1), signed.to(dtype).unsqueeze(1)


def rotate(x: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Heads (n, H, h) turned by angles (n, 1, r); numbers beyond the first r stay."""
    r = cosine.shape[-1]
    x = x.to(cosine.dtype)  # coarser under autocast
    turned = x if r == x.shape[-1] else x[..., :r]
    turned = torch.addcmul(turned * cosine, turned.roll(r // 2, -1), signed_sine)
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:]], -1)
