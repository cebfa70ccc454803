"""Kernels of a decoding step on a GPU, in Triton, which comes with torch's builds for CUDA.

A step of a batch is hundreds of small operations that each wait for memory. Three kernels stand for most of them: a
token's look at its ring (with its rotary positions and the writing of its key and value), the sum and the norm before
each block, and the product of a gated MLP's two halves.

Shapes: N slots, H query heads, G key-value heads, h width of a head, C ring columns, D width of the model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmgym.models.lean.parts import Norm
from lmgym.models.lean.transformer import Heads

# Of a look at a ring: columns at once, warps, and stages that are loaded ahead, for one query a key-value head and for
# several. The quickest on an H100, at 25 heads of 64 and at 8 of 128 for 32 queries.
_ONE = (16, 2, 3)
_SEVERAL = (16, 2, 3)
_MIN_ROWS = 16  # of a matrix product in Triton, which is quicker than sums of products for a query alone too
_GATED = 1024  # numbers at once


def attend_ring(
    heads: Heads, angles: tuple[Tensor, Tensor] | None, rings: tuple[Tensor, Tensor], age: Tensor, column: Tensor,
    scaling: float,
) -> Tensor:  # fmt: skip
    """What the queries of the newest tokens find in rings, into which their keys and values are written.

    Args:
        heads: of tokens that are not turned yet. angles: (N, 1, r) cosine and signed sine, or None.
        rings: keys and values (N, G, C, h), the last dimension contiguous.
        age: (N,) int64 tokens that each slot has seen. column: (1,) int64 that is written. scaling: of the scores.

    Returns:
        (N, H * h).
    """
    queries, keys, values = heads
    n, query_heads, width = queries.shape
    groups = keys.shape[1]
    a_group = query_heads // groups
    found = torch.empty((n, query_heads * width), dtype=queries.dtype, device=queries.device)
    cosine, sine = angles if angles is not None else (queries, queries)
    columns, warps, stages = _ONE if a_group == 1 else _SEVERAL
    _attend[(n, groups)](
        queries, keys, values, rings[0], rings[1], found, age, column, cosine, sine,
        scaling, rings[0].shape[2],
        queries.stride(0), queries.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        rings[0].stride(0), rings[0].stride(1), rings[0].stride(2),
        A_GROUP=a_group,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(a_group)),
        WIDTH=width,
        PADDED=max(_MIN_ROWS, triton.next_power_of_2(width)),
        TURNED=0 if angles is None else cosine.shape[-1],
        COLUMNS=columns,
        STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    return found


@triton.jit
def _turn(pointer, x, i, is_inside, cosine, sine, TURNED: tl.constexpr):
    """A head x at `pointer`, turned by its angles; numbers beyond the first TURNED stay."""
    if TURNED > 0:
        is_turned = i < TURNED
        partner = tl.where(is_turned, (i + TURNED // 2) % TURNED, i)
        other = tl.load(pointer + partner, mask=is_inside, other=0.0).to(tl.float32)
        c = tl.load(cosine + i, mask=is_turned, other=1.0).to(tl.float32)
        s = tl.load(sine + i, mask=is_turned, other=0.0).to(tl.float32)
        x = x * c + other * s
    return x


@triton.jit
def _attend(
    queries, keys, values, key_ring, value_ring, found, ages, column_of, cosines, sines,
    scaling, columns,
    query_slot, query_head, key_slot, key_head, value_slot, value_head,
    ring_slot, ring_head, ring_column,
    A_GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TURNED: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One slot and one key-value head: softmax over its ring, block by block, with a running maximum."""
    slot = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    i = tl.arange(0, PADDED)
    is_inside = i < WIDTH
    dtype = key_ring.dtype.element_ty
    age = tl.load(ages + slot)
    column = tl.load(column_of)
    cosine = cosines + slot * TURNED
    sine = sines + slot * TURNED

    at = keys + slot * key_slot + group * key_head
    new_key = tl.load(at + i, mask=is_inside, other=0.0).to(tl.float32)
    new_key = _turn(at, new_key, i, is_inside, cosine, sine, TURNED).to(dtype)
    new_value = tl.load(values + slot * value_slot + group * value_head + i, mask=is_inside, other=0.0).to(dtype)
    key_start = key_ring + slot * ring_slot + group * ring_head
    value_start = value_ring + slot * ring_slot + group * ring_head
    tl.store(key_start + column * ring_column + i, new_key, mask=is_inside)
    tl.store(value_start + column * ring_column + i, new_value, mask=is_inside)

    row = tl.arange(0, ROWS)
    head = group * A_GROUP + row
    is_head = row < A_GROUP
    at_rows = queries + slot * query_slot + head[:, None] * query_head
    is_read = is_head[:, None] & is_inside[None, :]
    query = tl.load(at_rows + i[None, :], mask=is_read, other=0.0).to(tl.float32)
    if TURNED > 0:
        is_turned = i < TURNED
        partner = tl.where(is_turned, (i + TURNED // 2) % TURNED, i)
        other = tl.load(at_rows + partner[None, :], mask=is_read, other=0.0).to(tl.float32)
        c = tl.load(cosine + i, mask=is_turned, other=1.0).to(tl.float32)
        s = tl.load(sine + i, mask=is_turned, other=0.0).to(tl.float32)
        query = query * c[None, :] + other * s[None, :]
    query = query.to(dtype)

    # The newest token comes first, so that there is a maximum from the start.
    highest = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scaling
    total = tl.full([ROWS], 1.0, tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32) + new_value.to(tl.float32)[None, :]
    for start in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        c_index = start + tl.arange(0, COLUMNS)
        ago = (column - c_index + columns) % columns
        is_old = (ago <= age) & (ago > 0) & (c_index < columns)
        is_loaded = is_old[:, None] & is_inside[None, :]
        offsets = c_index[:, None] * ring_column + i[None, :]
        key = tl.load(key_start + offsets, mask=is_loaded, other=0.0)
        value = tl.load(value_start + offsets, mask=is_loaded, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(is_old[None, :], scores * scaling, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - above[:, None])
        faded = tl.exp(highest - above)
        total = total * faded + tl.sum(weights, 1)
        sums = sums * faded[:, None] + tl.dot(weights.to(dtype), value, input_precision="ieee")
        highest = above
    out = sums / total[:, None]
    at_found = found + (slot * tl.num_programs(1) * A_GROUP + head[:, None]) * WIDTH + i[None, :]
    tl.store(at_found, out.to(dtype), mask=is_read)


def add_norm(x: Tensor, bias: Tensor | None, norm: Norm) -> Tensor:
    """The norm of x (N, D) after a bias (D,) was added to it, in place.

    Returns:
        (N, D).
    """
    n, width = x.shape
    read = torch.empty_like(x)
    weight: Tensor = norm.parameters["weight"]
    shift: Tensor | None = None if norm.by_root_mean_square else norm.parameters["bias"]
    padded = triton.next_power_of_2(width)
    _add_norm[(n,)](
        x, weight if bias is None else bias, weight, weight if shift is None else shift, read, width, norm.eps,
        PADDED=padded,
        HAS_BIAS=bias is not None,
        HAS_SHIFT=shift is not None,
        BY_ROOT_MEAN_SQUARE=norm.by_root_mean_square,
        num_warps=4 if padded <= 2048 else 8,
    )  # fmt: skip
    return read


@triton.jit
def _add_norm(
    x_of, bias, weight, shift, read, width, eps,
    PADDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, BY_ROOT_MEAN_SQUARE: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, PADDED)
    is_inside = i < width
    x = tl.load(x_of + row + i, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + i, mask=is_inside, other=0.0).to(tl.float32)
        rounded = x.to(x_of.dtype.element_ty)
        tl.store(x_of + row + i, rounded, mask=is_inside)
        x = rounded.to(tl.float32)
    if not BY_ROOT_MEAN_SQUARE:
        x = tl.where(is_inside, x - tl.sum(x, 0) / width, 0.0)
    y = x / tl.sqrt(tl.sum(x * x, 0) / width + eps) * tl.load(weight + i, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        y += tl.load(shift + i, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(read + row + i, y.to(read.dtype.element_ty), mask=is_inside)


def silu_times(gate: Tensor, x: Tensor) -> Tensor:
    """SiLU(gate) * x, written over the gate; both contiguous and of one shape."""
    _silu_times[(triton.cdiv(gate.numel(), _GATED),)](gate, x, gate.numel(), BLOCK=_GATED, num_warps=4)
    return gate


@triton.jit
def _silu_times(gate_of, x_of, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = i < count
    gate = tl.load(gate_of + i, mask=is_inside, other=0.0).to(tl.float32)
    x = tl.load(x_of + i, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(gate_of + i, (gate / (1.0 + tl.exp(-gate)) * x).to(gate_of.dtype.element_ty), mask=is_inside)
