"""Log-probs of given tokens under a large vocabulary, without the logits of all tokens at once.

Shapes: n positions, D width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmgym.models.lean.parts import Linear
from lmgym.models.lean.products import affine

_COLUMNS = 4096  # of the vocabulary at once: the logits of a few hundred positions stay in the processor's cache


def score_by_columns(
    head: Linear, hidden: Tensor, tokens: Tensor, vocab_size: int, holes: Sequence[int], temperature: float
) -> Tensor:
    """log softmax(logits)[token], the normaliser summed block by block of the vocabulary.

    Args:
        head: the LM head. hidden: (n, D), its inputs. tokens: (n,) int64.
        vocab_size, holes, temperature: as for `lmgym.models.causal.legal_logits`.

    Returns:
        (n,) nats.
    """
    weight = head.weight
    bias = head.parameters["bias"]
    chosen = hidden.new_full((len(hidden),), -torch.inf)
    normalisers = []
    for start in range(0, vocab_size, _COLUMNS):
        stop = min(start + _COLUMNS, vocab_size)
        logits = affine(hidden, weight[:, start:stop], None if bias is None else bias[start:stop])
        if temperature != 1:
            logits /= temperature
        inside = [hole - start for hole in holes if start <= hole < stop]
        if inside:
            logits[:, inside] = -torch.inf
        normalisers.append(logits.logsumexp(-1))
        columns = tokens - start
        is_here = (columns >= 0) & (columns < stop - start)
        found = logits.gather(1, columns.clamp(0, stop - start - 1).unsqueeze(1)).squeeze(1)
        chosen = torch.where(is_here, found, chosen)
    return chosen - torch.stack(normalisers).logsumexp(0)
