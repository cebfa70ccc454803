"""The laws tokens are drawn from: greedy, temperature, top-k, top-p, and greedy for the first n tokens.

A sampler is a map from logits to a law; what it draws comes with its exact log-prob under that law, because a KL or a
ratio with any other log-prob is wrong. A draw costs one uniform number, which the caller brings: a row's tokens then
depend on its own uniforms alone, whatever its batch-mates and its device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmgym.errors import NotFiniteError, check_int, check_number

_BLOCK = 256
_ONE_LEVEL = 4096  # vocabularies up to this are inverted without blocks: fewer calls


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keeps the k likeliest tokens; 0 keeps all.
        top_p: keeps the smallest set of likeliest tokens whose mass reaches p (Holtzman et al. 2020); 1 keeps all.
        greedy_tokens: the first n tokens of a response are greedy, the rest follow the law above.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy_tokens: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0)
        check_int("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, 0, 1, open_low=True)
        check_int("greedy_tokens", self.greedy_tokens, 0)

    def is_greedy(self, t: int) -> bool:
        """Whether response token t is a point mass."""
        return self.temperature == 0 or self.top_k == 1 or t < self.greedy_tokens

    def law(self, logits: Tensor, t: int) -> Tensor:
        """Unnormalised log-law of response token t: logits in float32 with -inf outside the support.

        Args:
            logits: (B, V). t: place of the token in its response, from 0.

        Returns:
            (B, V) float32; its log-softmax is the law.
        """
        logits = logits.float()
        if self.is_greedy(t):
            return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
        if self.temperature != 1:
            logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = _keep_top_k(logits, self.top_k)
        return _keep_top_p(logits, self.top_p) if self.top_p < 1 else logits

    def log_law(self, logits: Tensor, t: Tensor) -> Tensor:
        """Normalised log-probs of tokens at any places of their responses; differentiable.

        Args:
            logits: (n, V). t: (n,) places, from 0.

        Returns:
            (n, V) float32, -inf outside the support.
        """
        law = self.law(logits, self.greedy_tokens)
        if self.greedy_tokens:
            law = torch.where((t < self.greedy_tokens).unsqueeze(1), self.law(logits, 0), law)
        return law.log_softmax(-1)

    def sample(self, logits: Tensor, t: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draws a token a row.

        Args:
            logits: (B, V). t: place of the token in its response, from 0.
            uniforms: (B,) float64 in [0, 1), all the randomness there is; unused where the law is greedy.

        Returns:
            tokens (B,) int64 and their log-probs (B,) float32 under the law.
        """
        if self.is_greedy(t):
            tokens = logits.argmax(-1)
            top = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
            return tokens, top - top  # 0, and NaN for a law that is none
        return inverse_cdf(self.law(logits, t), uniforms)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws from softmax(logits) by inverting the cumulative distribution at given uniforms.

    Sums in float64, so that no tail is lost to rounding, and never a token of probability 0. A large vocabulary is
    inverted on two levels, blocks of 256 and then within the block, in one pass over it. Logits that are no law (NaN,
    inf, or -inf throughout) give some token, with a log-prob of NaN (`check_finite_log_probs`).

    Args:
        logits: (B, V) float32, -inf allowed. uniforms: (B,) float64 in [0, 1).

    Returns:
        tokens (B,) int64, log-probs (B,) float32.
    """
    top = logits.amax(-1, keepdim=True)
    uniforms = uniforms.to(logits.device).unsqueeze(1)
    if logits.shape[1] <= _ONE_LEVEL:
        cumulative = (logits - top).exp_().cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        tokens = _first_beyond(cumulative, uniforms * total)
    else:
        tokens, total = _two_levels(logits, top, uniforms)
    log_probs = logits.gather(1, tokens) - top - total.log().float()
    return tokens.squeeze(1), log_probs.squeeze(1)


def _two_levels(logits: Tensor, top: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) tokens and (B, 1) total weight exp(logits - top) of (B, V) logits with maxima (B, 1)."""
    rows, vocabulary = logits.shape
    weights = logits.new_empty((rows, vocabulary + -vocabulary % _BLOCK))  # whole blocks, without a padded copy
    weights[:, vocabulary:] = 0.0
    torch.sub(logits.detach(), top.detach(), out=weights[:, :vocabulary]).exp_()
    blocks = weights.view(rows, -1, _BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    target = uniforms * total
    block = _first_beyond(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=weights.device), block.squeeze(1)].cumsum(-1, dtype=torch.float64)
    tokens = block * _BLOCK + _first_beyond(inside, target - before)
    return tokens.clamp_(max=vocabulary - 1), total  # beyond it for a law that is none


def _first_beyond(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, 1) first index whose cumulative weight (B, n) is beyond the target (B, 1): never one of weight 0."""
    inside = torch.minimum(target, cumulative[:, -1:] * (1 - 1e-15))  # a uniform next to 1 may round onto the total
    return torch.searchsorted(cumulative, inside, right=True).clamp_(max=cumulative.shape[1] - 1)  # NaN lies beyond all


def check_finite_log_probs(log_probs: Tensor) -> None:
    """Raises where tokens were drawn from logits that are no law: NaN, inf, or -inf throughout.

    Args:
        log_probs: of the tokens drawn, any shape.

    Raises:
        NotFiniteError: saying what a policy's logits come to be so of.
    """
    wrong = log_probs[~log_probs.isfinite()]
    if len(wrong):
        raise NotFiniteError(
            f"A policy must give finite log-probs, and {len(wrong):,} of {log_probs.numel():,} are {wrong[0].item()}: "
            "its weights are not finite, or its logits overflow. Where it is in training, try a lower learning rate."
        )


def _keep_top_k(logits: Tensor, k: int) -> Tensor:
    kept = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter_(-1, kept.indices, kept.values)


def _keep_top_p(logits: Tensor, p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # A token stays while the mass before it is below p, so the likeliest always stays.
    dropped = probs.cumsum(-1) - probs >= p
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
