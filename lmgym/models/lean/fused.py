"""The lean forward of a decoding step on a GPU, in few launches: by Triton's kernels, and products that add in place.

Shapes: N slots, D width of the model, V vocabulary, C ring columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lmgym.models.lean.parts import MLP, GatedMLP, Linear, gelu_kind
from lmgym.models.lean.products import affine
from lmgym.models.lean.transformer import Transformer

_ALIGNED = 64  # columns of a half-precision matrix come in such steps where its products are to be fast
_PROBE_COLUMNS = 32
_PROBE_STEPS = 3


class FusedStep:
    """The hidden states of `Transformer.step`, by fused kernels.

    Args:
        lean: the model. kernels: the module `lmgym.models.lean.kernels`.
    """

    def __init__(self, lean: Transformer, kernels: ModuleType) -> None:
        self._lean = lean
        self._kernels = kernels

    def step(self, tokens: Tensor, age: Tensor, column: Tensor, rings: Sequence[Tensor]) -> Tensor:
        """(N, D), as `Transformer.step`."""
        kernels = self._kernels
        x, angles = self._lean.embed(tokens, age)
        bias: Tensor | None = None  # of the last product, which the next norm adds
        for i, layer in enumerate(self._lean.layers):
            heads = layer.project(kernels.add_norm(x, bias, layer.attention_norm))
            bias = None
            ring = (rings[2 * i], rings[2 * i + 1])
            found = kernels.attend_ring(heads, angles, ring, age, column, layer.scaling)
            if layer.parallel:
                x = layer.finish(x, found)
                continue
            x.addmm_(found, layer.out.weight)
            inner = self._inner(layer.mlp, kernels.add_norm(x, layer.out.parameters["bias"], layer.mlp_norm))
            x.addmm_(inner, layer.mlp.down.weight)
            bias = layer.mlp.down.parameters["bias"]
        read: Tensor = kernels.add_norm(x, bias, self._lean.norm)
        return read

    def _inner(self, mlp: MLP | GatedMLP, x: Tensor) -> Tensor:
        """What the last layer of an MLP reads."""
        if isinstance(mlp, GatedMLP):
            if not _is_silu(mlp.activation):
                return mlp.inner(x)
            gated: Tensor = self._kernels.silu_times(mlp.gate(x), mlp.up(x))
            return gated
        bias = mlp.up.parameters["bias"]
        if bias is None or not x.is_cuda or gelu_kind(mlp.activation) != "tanh":  # on a CPU it is no such GELU
            return mlp.inner(x)
        return torch._addmm_activation(bias, x, mlp.up.weight, use_gelu=True)  # the GELU in the product's own kernel


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


class AlignedHead:
    """A copy of a half-precision LM head with columns filled up to a multiple of 64.

    Where a matrix has an odd number of columns, as GPT-2's 50,257, kernels for such matrices are several times slower.

    Args:
        head: the LM head. vocab_size: V, the first columns that are used.
    """

    def __init__(self, head: Linear, vocab_size: int) -> None:
        weight = head.weight
        self._head = head
        self._vocab_size = vocab_size
        columns = vocab_size + -vocab_size % _ALIGNED
        # In memory a row is a token, as it is in the embedding.
        self._weight = weight.new_zeros((columns, weight.shape[0]))
        self._bias = None if head.parameters["bias"] is None else weight.new_zeros(columns)
        self._written: tuple[int, int] | None = None
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Takes over the weight where it was written to since the last time."""
        weight = self._head.parameters["weight"]
        written = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if written == self._written:
            return
        self._written = written
        self._weight[: self._vocab_size].copy_(self._head.weight.t()[: self._vocab_size])
        if self._bias is not None:
            self._bias[: self._vocab_size].copy_(self._head.parameters["bias"][: self._vocab_size])

    def __call__(self, hidden: Tensor) -> Tensor:
        """(N, V) logits of hidden states (N, D)."""
        return affine(hidden, self._weight.t(), self._bias)[:, : self._vocab_size]


def align_head(head: Linear | None, vocab_size: int) -> AlignedHead | None:
    """The copy of a head, where it pays."""
    if head is None or head.weight.device.type != "cuda" or head.weight.element_size() != 2 or vocab_size % 8 == 0:
        return None
    return AlignedHead(head, vocab_size)


@torch.inference_mode()
def find_fused(lean: Transformer) -> FusedStep | None:
    """The fused step of a model on a GPU, compared with its lean step; None where there is none that gives the same."""
    weight = lean.tokens["weight"]
    positions = None if lean.positions is None else lean.positions["weight"]
    if weight.device.type != "cuda" or (positions is not None and len(positions) < _PROBE_COLUMNS):
        return None
    try:
        from lmgym.models.lean import kernels

        fused = FusedStep(lean, kernels)
        gap = _compare(lean, fused)
    except Exception:  # Triton is not there, cannot compile for this GPU, or knows no kernel of that shape
        return None
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.2
    return fused if gap <= tolerance else None


def _compare(lean: Transformer, fused: FusedStep) -> float:
    """How far hidden states are from those of the lean step, along a few steps of two slots, as a share of their norm.

    In half precision single numbers may be far off, where the roundings of many layers add up.
    """
    device = lean.tokens["weight"].device
    ids = torch.arange(8, device=device).view(2, 4) % len(lean.tokens["weight"])
    _, states = lean.read(ids)
    plain = [x.new_zeros((2, x.shape[1], _PROBE_COLUMNS, x.shape[3])) for x in states]
    for ring, state in zip(plain, states, strict=True):
        ring[:, :, :4] = state
    other = [ring.clone() for ring in plain]
    age = torch.tensor([4, 2], device=device)
    gaps = []
    for t in range(_PROBE_STEPS):
        column = torch.tensor([4 + t], device=device)
        expected = lean.step(ids[:, t], age + t, column, plain).float()
        found = fused.step(ids[:, t], age + t, column, other).float()
        gaps.append((found - expected).norm() / expected.norm())
    return float(torch.stack(gaps).nan_to_num(torch.inf).max())
