"""Log-probs, entropies and KLs of categorical distributions given by logits, with gradients written by hand.

Autograd would keep a normalised copy of the logits and make four more on the way back. Here rows go through in blocks
that stay in the processor's cache: forward holds the logits alone, backward their gradient besides. The plain forms are
`log_softmax`, `lmgym.kl.entropy` and `lmgym.kl.exact`.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmgym.models.kernels import find_kernels

_BLOCK_NUMBERS = 1 << 20  # in a block of logits: 4 MB
_GPU_BLOCK_NUMBERS = 1 << 26
_LOWEST = -1e30  # stands for -inf where it is multiplied by a probability of 0


def log_probs_and_entropies(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of chosen tokens and the entropy of every row; differentiable once.

    Args:
        logits: (n, V), not normalised, -inf outside the support. tokens: (n,) int64.

    Returns:
        log-probs (n,), -inf for a token outside the support, and entropies (n,): nats, in float32 or as the logits.
    """
    log_probs, entropies = _LogProbs.apply(logits, tokens)  # type: ignore[no-untyped-call]
    return log_probs, entropies


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL of every row to another distribution; differentiable once, in `logits`.

    Args:
        logits: (n, V), not normalised, -inf outside the support. ref_logits: (n, V) of the other, the same.

    Returns:
        (n,) nats, in float32 or as the logits.
    """
    kl: Tensor = _ExactKL.apply(logits, ref_logits)  # type: ignore[no-untyped-call]
    return kl


class _LogProbs(torch.autograd.Function):
    """d log p(a) / d logits = 1[a] - p, and d H / d logits = -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kernels = find_kernels(logits)
        if ctx.kernels is not None:
            log_probs, entropies, normalisers = ctx.kernels.log_probs_and_entropies(logits, tokens)
            ctx.save_for_backward(logits, tokens, entropies, normalisers)
            return log_probs, entropies
        tops = logits.new_empty(len(logits), dtype=_fine_dtype(logits))
        log_totals = torch.empty_like(tops)
        entropies = torch.empty_like(tops)
        for rows in _blocks(logits):
            block = _fine(logits[rows])
            tops[rows] = block.amax(-1)
            gaps = (block - tops[rows, None]).clamp_(min=_LOWEST)
            weights = gaps.exp()
            totals = weights.sum(-1)
            log_totals[rows] = totals.log()
            entropies[rows] = log_totals[rows] - gaps.mul_(weights).sum(-1) / totals
        log_probs = logits.gather(1, tokens[:, None]).squeeze(1) - tops - log_totals
        ctx.save_for_backward(logits, tokens, tops, log_totals, entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_log_probs: Tensor | None, by_entropies: Tensor | None) -> tuple[Tensor, None]:
        if ctx.kernels is not None:
            pull_back = ctx.kernels.gradient_of_log_probs_and_entropies
            return pull_back(*ctx.saved_tensors, by_log_probs, by_entropies), None
        logits, tokens, tops, log_totals, entropies = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _blocks(logits):
            gaps = _fine(logits[rows]) - tops[rows, None]
            log_distribution = gaps.sub_(log_totals[rows, None]).clamp_(min=_LOWEST)
            probs = log_distribution.exp()
            factor = probs.new_zeros(())
            if by_log_probs is not None:
                factor = factor - by_log_probs[rows, None]
            if by_entropies is not None:
                factor = factor - by_entropies[rows, None] * (log_distribution + entropies[rows, None])
            gradient[rows] = probs.mul_(factor)
        if by_log_probs is not None:
            gradient.scatter_add_(1, tokens[:, None], by_log_probs[:, None].to(gradient.dtype))
        return gradient, None


class _ExactKL(torch.autograd.Function):
    """d KL / d logits = p (log p / p_ref - KL)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor) -> Tensor:
        kl = logits.new_empty(len(logits), dtype=_fine_dtype(logits))
        for rows in _blocks(logits):
            probs, log_ratio = _probs_and_log_ratio(logits[rows], ref_logits[rows])
            kl[rows] = log_ratio.mul_(probs).sum(-1)
        ctx.save_for_backward(logits, ref_logits, kl)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_kl: Tensor) -> tuple[Tensor, None]:
        logits, ref_logits, kl = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _blocks(logits):
            probs, log_ratio = _probs_and_log_ratio(logits[rows], ref_logits[rows])
            slope = log_ratio.sub_(kl[rows, None]).mul_(by_kl[rows, None])
            gradient[rows] = probs.mul_(slope)
        return gradient, None


def _probs_and_log_ratio(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (b, V), and log p / p_ref (b, V), which is 0 outside the support."""
    log_distribution = _fine(logits).log_softmax(-1)
    log_ratio = log_distribution - _fine(ref_logits).log_softmax(-1)
    log_ratio.masked_fill_(log_distribution == -torch.inf, 0.0)
    return log_distribution.exp_(), log_ratio


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Yields the rows of blocks, in their order."""
    numbers = _GPU_BLOCK_NUMBERS if logits.is_cuda else _BLOCK_NUMBERS
    size = max(1, numbers // logits.shape[1])
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def _fine(logits: Tensor) -> Tensor:
    """Logits in float32, or finer where they are."""
    return logits.to(_fine_dtype(logits))


def _fine_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
