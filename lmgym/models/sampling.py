"""How tokens are drawn: greedy, temperature, top-k, top-p, and greedy for the first n tokens.

A sampler turns logits into a distribution. What it draws comes with its exact log-prob under that distribution, because
a KL or a ratio with any other log-prob is wrong. A draw costs one uniform number, which the caller brings: the tokens
of a row depend on its own uniforms alone, and not on its batch-mates or its device.

Shapes: B rows, V vocabulary, n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.errors import NotFiniteError
from lmgym.models.kernels import find_kernels
from lmgym.ranges import CountOrZero, NonNegative, PositiveFraction, check_fields

_BLOCK_SIZE = 256  # tokens
_MAX_ONE_LEVEL_VOCABULARY = 4096  # vocabularies up to this are inverted without blocks, in fewer calls


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the smallest set of likeliest tokens whose mass reaches p (Holtzman et al. 2020); 1 keeps all.
        greedy_tokens: the first n tokens of a response are greedy; the others are drawn as above.
    """

    temperature: NonNegative = 1.0
    top_k: CountOrZero = 0
    top_p: PositiveFraction = 1.0
    greedy_tokens: CountOrZero = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def is_greedy(self, t: int) -> bool:
        """Whether response token t is a point mass."""
        return self.temperature == 0 or self.top_k == 1 or t < self.greedy_tokens

    def adjust_logits(self, logits: Tensor, t: int) -> Tensor:
        """Logits of the distribution that response token t is drawn from.

        Args:
            logits: (B, V) of the model. t: position of the token in its response, from 0.

        Returns:
            (B, V) float32, -inf outside the support; not normalised.
        """
        logits = logits.float()
        if self.is_greedy(t):
            return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
        if self.temperature != 1:
            logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = _keep_top_k(logits, self.top_k)
        return _keep_top_p(logits, self.top_p) if self.top_p < 1 else logits

    def adjust_rows(self, logits: Tensor, t: Tensor) -> Tensor:
        """Logits of the distributions that tokens are drawn from, each row at a position of its own; differentiable.

        Args:
            logits: (n, V) of the model. t: (n,) positions of the tokens in their responses, from 0.

        Returns:
            (n, V), -inf outside the support; not normalised.
        """
        if self == _PLAIN:
            return logits
        adjusted = self.adjust_logits(logits, self.greedy_tokens)
        if self.greedy_tokens:
            greedy = self.adjust_logits(logits, 0)
            adjusted = torch.where((t < self.greedy_tokens).unsqueeze(1), greedy, adjusted)
        return adjusted

    def log_distribution(self, logits: Tensor, t: Tensor) -> Tensor:
        """(n, V) float32 log-probs of every token, those of `adjust_rows` normalised; differentiable."""
        return self.adjust_rows(logits, t).float().log_softmax(-1)

    def sample(self, logits: Tensor, t: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a token a row.

        Args:
            logits: (B, V) of the model. t: position of the token in its response, from 0.
            uniforms: (B,) float64 in [0, 1), all the randomness there is; not used where token t is greedy.

        Returns:
            tokens (B,) int64, and their log-probs (B,) float32 under the distribution that they were drawn from.
        """
        if self.is_greedy(t):
            tokens = logits.argmax(-1)
            top = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
            return tokens, top - top  # 0, or NaN where the logits are not finite
        return inverse_cdf(logits if self == _PLAIN else self.adjust_logits(logits, t), uniforms)


_PLAIN = Sampler()  # made once: its fields are checked when it is made


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws from softmax(logits) by inverting the cumulative distribution at given uniforms.

    The sums are in float64, so that rounding loses no tail, and a token of probability 0 is never drawn. A large
    vocabulary is inverted on two levels: first blocks of 256 tokens, then within the block. Logits that define no
    distribution (NaN, inf, or -inf everywhere) give some token with a log-prob of NaN (`check_finite_log_probs`).

    Args:
        logits: (B, V), -inf allowed. uniforms: (B,) float64 in [0, 1).

    Returns:
        tokens (B,) int64, log-probs (B,) float32.
    """
    uniforms = uniforms.to(logits.device)
    kernels = None if logits.requires_grad else find_kernels(logits)
    if kernels is not None:
        return kernels.draw(logits, uniforms)
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    uniforms = uniforms.unsqueeze(1)
    if logits.shape[1] <= _MAX_ONE_LEVEL_VOCABULARY:
        cumulative = (logits - top).exp_().cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        tokens = _first_beyond(cumulative, uniforms * total)
    else:
        tokens, total = _two_levels(logits, uniforms)
    log_probs = logits.gather(1, tokens) - top - total.log().float()
    return tokens.squeeze(1), log_probs.squeeze(1)


def _two_levels(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) tokens and (B, 1) total weight exp(logits - their maximum) of (B, V) logits."""
    vocabulary = logits.shape[1]
    probs = logits.detach().softmax(-1)  # in one pass, where exp(logits - top) and its sum are three
    whole = vocabulary - vocabulary % _BLOCK_SIZE
    sums = probs[:, :whole].unflatten(1, (-1, _BLOCK_SIZE)).sum(-1, dtype=torch.float64)
    rest = probs[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    cumulative = torch.cat([sums, rest], dim=1).cumsum(-1)
    target = uniforms * cumulative[:, -1:]
    block = _first_beyond(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    columns = block * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE, device=logits.device)
    inside = probs.gather(1, columns.clamp(max=vocabulary - 1)).masked_fill(columns >= vocabulary, 0.0)
    tokens = block * _BLOCK_SIZE + _first_beyond(inside.cumsum(-1, dtype=torch.float64), target - before)
    total = 1 / probs.amax(-1, keepdim=True).double()
    return tokens.clamp_(max=vocabulary - 1), total  # it would be larger where the logits are NaN


def _first_beyond(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, 1) the first index whose cumulative weight (B, n) exceeds the target (B, 1): never one of weight 0."""
    inside = torch.minimum(target, cumulative[:, -1:] * (1 - 1e-15))  # a uniform close to 1 may round to the total
    return torch.searchsorted(cumulative, inside, right=True).clamp_(max=cumulative.shape[1] - 1)  # NaN exceeds all


def check_finite_log_probs(log_probs: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises where tokens were drawn from logits that define no distribution: NaN, inf, or -inf everywhere.

    Args:
        log_probs: of the tokens drawn, any shape. dtype: of the logits, where that is known.

    Raises:
        NotFiniteError: with the usual cause, and what to try.
    """
    wrong = log_probs[~log_probs.isfinite()]
    if len(wrong):
        raise NotFiniteError(
            f"A policy must give finite log-probs, and {len(wrong):,} of {log_probs.numel():,} are {wrong[0].item()}: "
            f"its weights are not finite, or its logits overflow{_limit_of(dtype)}. Where it is in training, "
            "try a lower learning rate."
        )


def _limit_of(dtype: torch.dtype | None) -> str:
    """What ends the numbers of a dtype so soon that it is worth a word, as a part of a sentence."""
    if dtype != torch.float16:
        return ""
    return " (the largest number of float16 is 65,504: take dtype='bfloat16' or dtype='float32')"


def _keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with -inf on all but the k likeliest tokens."""
    top = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter_(-1, top.indices, top.values)


def _keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with -inf on all but the smallest set of likeliest tokens whose probability reaches p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # A token stays while the mass before it is below p, so the likeliest always stays.
    dropped = probs.cumsum(-1) - probs >= p
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
