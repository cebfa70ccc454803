"""Responses while they are drawn, in tensors that stay where they are.

What a token needs is all on the device: its uniform number, its position, whether its response has ended. So a step and
the draw from its logits can be launched as one CUDA graph, and the host need not know what was drawn.

Shapes: B responses, T response columns, n slots that go on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lmgym.ending import EndRule
from lmgym.models.sampling import Sampler


class Drawing:
    """B responses that are being drawn.

    Args:
        sampler: how tokens are drawn, given logits.
        end_rule: when a response ends, with a table on the device.
        uniforms: (B, T) float64 on the device, one for each token.
        pad_token_id: stands after an end.
        key: equal for drawings that differ in their uniforms alone.

    Attributes:
        response_ids: (B, T) int64. log_probs: (B, T) float32, 0 after an end.
        values: (B, T) float32, the critic's estimates, 0 after an end; None until one is given.
        rows: (B,) int64, the response that each slot draws. tokens: (B,) int64, the newest of each slot.
        running: (B,) bool, whether the response of a slot goes on. Of all three the first n are in use.
        dtype: of the logits drawn from; None before the first.
        position: of the next token, from 0, and column: (1,) int64, the same on the device. size: n.
    """

    def __init__(
        self, sampler: Sampler, end_rule: EndRule[Tensor], uniforms: Tensor, pad_token_id: int, key: Hashable = None
    ) -> None:
        b, horizon = uniforms.shape
        device = uniforms.device
        self.sampler = sampler
        self.uniforms = uniforms
        self.key = (sampler, b, horizon, pad_token_id, key)
        self.response_ids = torch.full((b, horizon), pad_token_id, device=device)
        self.log_probs = torch.zeros((b, horizon), device=device)
        self.values: Tensor | None = None
        self.rows = torch.arange(b, device=device)
        self.tokens = torch.zeros(b, dtype=torch.int64, device=device)
        self.running = torch.ones(b, dtype=torch.bool, device=device)
        self.dtype: torch.dtype | None = None
        self.position = 0
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.size = b
        self._end_rule = end_rule
        self._pad_token_id = pad_token_id

    def start(self, prefix: Tensor) -> None:
        """Goes on from tokens (B, S) of the responses, before anything has been drawn."""
        size = prefix.shape[1]
        self.response_ids[:, :size] = prefix
        self.position = size
        self.column += size

    def draw(self, logits: Tensor, estimates: Tensor | None, column: int | Tensor | None = None) -> None:
        """Draws the next token of each slot.

        Args:
            logits: (n, V). estimates: (n,) of the critic, or None.
            column: the position, where it is to be read from a tensor (1,) when this is replayed.
        """
        t: int | Tensor = self.position if column is None else column
        self.dtype = logits.dtype
        rows = self.rows[: self.size]
        running = self.running[: self.size]
        tokens, log_probs = self.sampler.sample(logits, self.position, self.uniforms[rows, t])
        tokens = tokens.to(rows.device)
        self.tokens[: self.size] = tokens
        self.response_ids[rows, t] = torch.where(running, tokens, self._pad_token_id)
        self.log_probs[rows, t] = torch.where(running, log_probs.to(rows.device), 0.0)
        if estimates is not None:
            if self.values is None:
                self.values = torch.zeros_like(self.log_probs)
            self.values[rows, t] = torch.where(running, estimates.float().to(rows.device), 0.0)
        running &= ~self._end_rule.is_end_by_eos(tokens, t)

    def state(self) -> list[Tensor]:
        """What a draw reads and writes, but for the uniforms."""
        written = [self.response_ids, self.log_probs, self.rows, self.tokens, self.running, self.column]
        return written if self.values is None else [*written, self.values]

    def keep(self, slots: Tensor) -> None:
        """Goes on with these slots (n,) alone, in this order."""
        for state in (self.rows, self.tokens, self.running):
            state[: len(slots)] = state[slots]
        self.size = len(slots)

    def take_over(self, other: Drawing) -> None:
        """Becomes the other, in its own tensors; both have one key."""
        if other.values is not None and self.values is None:
            self.values = torch.zeros_like(self.log_probs)
        self.uniforms.copy_(other.uniforms)
        for mine, theirs in zip(self.state(), other.state(), strict=True):
            mine.copy_(theirs)
        self.position = other.position
        self.dtype = other.dtype
        self.size = other.size
