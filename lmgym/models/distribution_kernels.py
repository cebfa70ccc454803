"""Kernels of distributions over a vocabulary on a GPU, in Triton, which comes with torch's builds for CUDA.

By plain operations a draw is a dozen passes over the logits, and so are log-probs and entropies with their gradient.
Here a draw is one: of each block of tokens the largest logit and the weight, from which a second kernel finds the
block, and in it the token. Log-probs and entropies are two passes, of which the second reads what a cache still holds,
and their gradient is one.

Shapes: B rows, V vocabulary, n blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256  # tokens
_BLOCKS_AT_ONCE = 16
_TILE = 4096  # logits at once of a row that is read through


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws from softmax(logits) by inverting the cumulative distribution, as `sampling.inverse_cdf`.

    Args:
        logits: (B, V) of any float type, the last dimension contiguous. uniforms: (B,) float64 in [0, 1).

    Returns:
        tokens (B,) int64, log-probs (B,) float32.
    """
    b, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, _BLOCK)
    tops = torch.empty((b, blocks), device=logits.device)
    sums = torch.empty((b, blocks), dtype=torch.float64, device=logits.device)
    tokens = torch.empty(b, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(b, device=logits.device)
    at_once = min(_BLOCKS_AT_ONCE, triton.next_power_of_2(blocks))
    _weigh[(b, triton.cdiv(blocks, at_once))](
        logits, tops, sums, logits.stride(0), vocabulary, blocks, AT_ONCE=at_once, BLOCK=_BLOCK, num_warps=4
    )
    _find[(b,)](
        logits, tops, sums, uniforms, tokens, log_probs, logits.stride(0), uniforms.stride(0), vocabulary, blocks,
        BLOCKS=triton.next_power_of_2(blocks),
        BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return tokens, log_probs


@triton.jit
def _weigh(
    logits, tops, sums, stride, vocabulary, blocks,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a few blocks of a row: the largest logit, and the sum of exp(logit - the largest)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 1)
    base = tl.where(top == float("-inf"), 0.0, top)  # -inf everywhere: a weight of 0
    weight = tl.sum(tl.exp(x - base[:, None]).to(tl.float64), 1)
    at = row * blocks + block
    tl.store(tops + at, top, mask=block < blocks)
    tl.store(sums + at, weight, mask=block < blocks)


@triton.jit
def _first_beyond(weights, target, i):
    """The first i whose cumulative weight exceeds the target, never one of weight 0 where there is another."""
    cumulative = tl.cumsum(weights, 0)
    beyond = tl.min(tl.where((cumulative > target) & (weights > 0), i, 2147483647), 0)
    last = tl.max(tl.where(weights > 0, i, 0), 0)
    found = tl.minimum(beyond, last)
    return found, tl.sum(tl.where(i < found, weights, 0.0), 0)


@triton.jit
def _find(
    logits, tops, sums, uniforms, tokens, log_probs, stride, uniform_stride, vocabulary, blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row: its block first, then it within the block."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCKS)
    block_tops = tl.load(tops + row * blocks + i, mask=i < blocks, other=float("-inf"))
    block_sums = tl.load(sums + row * blocks + i, mask=i < blocks, other=0.0)
    top = tl.max(block_tops, 0)
    weights = block_sums * tl.exp(block_tops - top).to(tl.float64)
    total = tl.sum(weights, 0)
    target = tl.load(uniforms + row * uniform_stride) * total
    block, before = _first_beyond(weights, target, i)

    j = tl.arange(0, BLOCK)
    token = block * BLOCK + j
    x = tl.load(logits + row * stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    inside, _ = _first_beyond(tl.exp(x - top).to(tl.float64), target - before, j)
    drawn = tl.max(tl.where(j == inside, x, float("-inf")), 0)
    tl.store(tokens + row, (block * BLOCK + inside).to(tl.int64))
    tl.store(log_probs + row, drawn - top - tl.log(total).to(tl.float32))


def log_probs_and_entropies(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of tokens under softmax(logits), and the entropies.

    Args:
        logits: (B, V) of at most 32 bits, the last dimension contiguous. tokens: (B,) int64.

    Returns:
        log-probs (B,), entropies (B,) and the logarithms of the normalisers (B,), float32.
    """
    b, vocabulary = logits.shape
    log_probs, entropies, normalisers = torch.empty((3, b), device=logits.device)
    _read[(b,)](
        logits, tokens, log_probs, entropies, normalisers, logits.stride(0), tokens.stride(0), vocabulary,
        TILE=min(_TILE, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )  # fmt: skip
    return log_probs, entropies, normalisers


@triton.jit
def _read(
    logits, tokens, log_probs, entropies, normalisers, stride, token_stride, vocabulary,
    TILE: tl.constexpr,
):  # fmt: skip
    """A row: its largest logit, then the sums of weights exp(logit - the largest), and of these times the exponent."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    tops = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocabulary, TILE):
        x = tl.load(logits + row * stride + start + i, mask=start + i < vocabulary, other=float("-inf"))
        tops = tl.maximum(tops, x.to(tl.float32))
    top = tl.max(tops, 0)
    totals = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE], tl.float32)
    for start in range(0, vocabulary, TILE):
        x = tl.load(logits + row * stride + start + i, mask=start + i < vocabulary, other=float("-inf"))
        gap = x.to(tl.float32) - top
        weight = tl.exp(gap)
        totals += weight
        sums += tl.where(weight == 0.0, 0.0, weight * gap)
    total = tl.sum(totals, 0)
    log_total = tl.log(total)
    chosen = tl.load(logits + row * stride + tl.load(tokens + row * token_stride)).to(tl.float32)
    tl.store(log_probs + row, chosen - top - log_total)
    tl.store(entropies + row, log_total - tl.sum(sums, 0) / total)
    tl.store(normalisers + row, top + log_total)


def gradient_of_log_probs_and_entropies(
    logits: Tensor,
    tokens: Tensor,
    entropies: Tensor,
    normalisers: Tensor,
    by_log_probs: Tensor | None,
    by_entropies: Tensor | None,
) -> Tensor:
    """(B, V) the gradient in the logits, of what `log_probs_and_entropies` gave and of the gradients (B,) in that."""
    b, vocabulary = logits.shape
    gradient = torch.empty((b, vocabulary), dtype=logits.dtype, device=logits.device)
    nothing = normalisers
    tile = min(_TILE, triton.next_power_of_2(vocabulary))
    _pull_back[(b, triton.cdiv(vocabulary, tile))](
        logits, tokens, entropies, normalisers,
        nothing if by_log_probs is None else by_log_probs.contiguous(),
        nothing if by_entropies is None else by_entropies.contiguous(),
        gradient, logits.stride(0), tokens.stride(0), vocabulary,
        HAS_LOG_PROBS=by_log_probs is not None,
        HAS_ENTROPIES=by_entropies is not None,
        TILE=tile,
        num_warps=8,
    )  # fmt: skip
    return gradient


@triton.jit
def _pull_back(
    logits, tokens, entropies, normalisers, by_log_probs, by_entropies, gradient,
    stride, token_stride, vocabulary,
    HAS_LOG_PROBS: tl.constexpr, HAS_ENTROPIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of a row: d log p(a) / d logits = 1[a] - p, and d H / d logits = -p (log p + H)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
    log_distribution = x - tl.load(normalisers + row)
    probs = tl.exp(log_distribution)
    slope = tl.zeros([TILE], tl.float32)
    if HAS_LOG_PROBS:
        by_log_prob = tl.load(by_log_probs + row).to(tl.float32)
        is_chosen = i == tl.load(tokens + row * token_stride)
        slope += by_log_prob * (tl.where(is_chosen, 1.0, 0.0) - probs)
    if HAS_ENTROPIES:
        fall = probs * (log_distribution + tl.load(entropies + row))
        slope -= tl.load(by_entropies + row).to(tl.float32) * tl.where(probs == 0.0, 0.0, fall)
    tl.store(gradient + row * vocabulary + i, slope.to(gradient.dtype.element_ty), mask=i < vocabulary)
