"""Matrix products, by the library that is quickest for their shape.

torch multiplies float32 matrices on a CPU with MKL. oneDNN, which comes with torch too, is up to twice as fast where
the matrix is large (an LM head over 50,000 tokens), and applies a GELU while the product is in the processor's cache.
It costs 15 microseconds more a call.

Shapes: n rows, a inputs, b outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_ROWS = 8  # with fewer rows a product only reads the matrix, at the speed of the memory
_ROWS_STEP = 16  # rows are filled up to a multiple of it, and many rows to a multiple of the next
_MANY_ROWS = 128
_MANY_ROWS_STEP = 64
_MIN_NUMBERS = 2**19  # of a matrix, from which oneDNN is faster
_ALIGNED = 64  # columns of a half-precision matrix come in such steps where its products are to be fast
_MIN_GELU_PRODUCTS = 2**21  # n * a * b, from which it is faster with a GELU


@functools.cache  # at the first product: an import computes nothing
def find_onednn() -> Callable[..., Tensor] | None:
    """oneDNN's product; None in a build of torch that has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    operation: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operation is None:
        return None
    try:  # not a public function, so it is tried out
        with torch.no_grad():
            x = torch.arange(6.0).view(2, 3) / 6
            found = operation(x, x, x[0, :2], "gelu", [], "tanh")
            expected = F.gelu(F.linear(x, x, x[0, :2]), approximate="tanh")
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    product: Callable[..., Tensor] = operation
    return product if torch.allclose(found, expected, atol=1e-5) else None


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, b): x (n, a) @ weight (a, b) + bias (b,)."""
    if _is_large(x, weight) and find_onednn() is not None:
        if _needs_gradient(x, weight, bias):
            product: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
            return product if bias is None else product + bias
        return _multiply(x, weight, bias, "none", "")
    if _is_ragged(x, weight):
        product = torch.mm(x, _fill_up(weight))[:, : weight.shape[1]]
        return product if bias is None else product + bias
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def affine_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """(n, b): the GELU of `affine`; `approximate` as in `torch.nn.GELU`."""
    is_large = _is_float_on_cpu(x) and len(x) * weight.numel() >= _MIN_GELU_PRODUCTS
    if is_large and not _needs_gradient(x, weight, bias) and find_onednn() is not None:
        return _multiply(x, weight, bias, "gelu", approximate)
    return F.gelu(affine(x, weight, bias), approximate=approximate)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, function: str, approximate: str) -> Tensor:
    """By oneDNN, which writes a program for each number of rows and keeps it: few numbers come up."""
    onednn = find_onednn()
    assert onednn is not None
    n = len(x)
    step = _ROWS_STEP if n <= _MANY_ROWS else _MANY_ROWS_STEP
    filled = F.pad(x, (0, 0, 0, -n % step)) if n % step else x
    return onednn(filled, weight.t(), bias, function, [], approximate)[:n]


class _Product(torch.autograd.Function):
    """oneDNN's product, which torch knows no gradient of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, None, "none", "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x = gradient @ weight.t() if ctx.needs_input_grad[0] else None
        # In the layout of the weight itself, which may be stored as (b, a).
        by_weight = (gradient.t() @ x).t() if weight.t().is_contiguous() else x.t() @ gradient
        return by_x, by_weight if ctx.needs_input_grad[1] else None


def _fill_up(weight: Tensor) -> Tensor:
    """A copy of weight (a, b) with columns of zeros at the end, up to a multiple of 64; differentiable.

    A GPU multiplies half-precision matrices with an odd number of columns, as an LM head over GPT-2's 50,257 tokens,
    seven times as slowly as others.
    """
    # In memory a row is a column of the weight, as it is in an LM head.
    return F.pad(weight.t(), (0, 0, 0, -weight.shape[1] % _ALIGNED)).t()


def _is_ragged(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one of a GPU's half-precision ones with an odd number of columns."""
    return x.is_cuda and x.element_size() == 2 and x.dtype == weight.dtype and weight.shape[1] % 8 != 0


def logits_in_half(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, b) float32: x (n, a) @ weight (a, b) + bias (b,), of factors rounded to bfloat16 where that is quicker.

    Sums are in float32 and are not rounded, unlike those of a bfloat16 product, which is all that logits can bear. A
    CPU has no such product, and takes the float32 one.
    """
    if x.device.type != "cuda":
        return affine(x, weight, bias)
    product: Tensor = _HalfProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias


class _HalfProduct(torch.autograd.Function):
    """A product of bfloat16 factors with float32 results; so are both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        factors = (x.bfloat16(), weight.bfloat16())
        ctx.save_for_backward(*factors)
        return _multiply_half(*factors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rounded = gradient.bfloat16()
        by_x = _multiply_half(rounded, weight.t()) if ctx.needs_input_grad[0] else None
        # In the layout of the weight itself, which may be stored as (b, a).
        is_turned = weight.t().is_contiguous()
        by_weight = _multiply_half(rounded.t(), x).t() if is_turned else _multiply_half(x.t(), rounded)
        return by_x, by_weight if ctx.needs_input_grad[1] else None


def _multiply_half(x: Tensor, y: Tensor) -> Tensor:
    """float32 x @ y of bfloat16 matrices."""
    if x.device.type == "cuda":
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()  # the same numbers, but for the order of sums


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    return len(x) >= _MIN_ROWS and weight.numel() >= _MIN_NUMBERS and _is_float_on_cpu(x)


def _is_float_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
