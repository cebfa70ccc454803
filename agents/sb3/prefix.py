"""DQN, QR-DQN and RecurrentPPO as policies, which act without SB3: a full forward over each response, every token.

Shapes: B rows, n of them, P prompt columns, W columns, V vocabulary, H width of an LSTM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from agents.agent import TokenCount

_POINT_MASS = 1e4  # logit of the token that a greedy policy takes; the others have 0

# Sequences (n, W), their mask (n, W) and LSTM states to logits (n, V) and the next LSTM states.
Forward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class PrefixPolicy:
    """What DQN, QRDQN or RecurrentPPO does, as a policy.

    Of the first two the distribution is a point mass on the token of the highest Q.

    Args:
        model: SB3's object.
        tokens: what the networks count when they read; acting is no cost of training, and is subtracted again.
    """

    def __init__(self, model: Any, tokens: TokenCount) -> None:
        self._networks = model.policy
        self._tokens = tokens

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._networks.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> PrefixState:
        """Reads prompts (B, P), left-padded."""
        self._networks.set_training_mode(False)
        state = PrefixState(self._forward, prompt_ids[:, :0], prompt_mask[:, :0].bool())
        state.begin(torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask)
        return state

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(n, V) logits after sequences (n, W), and an LSTM's states (n, layers, 2H) after them.

        `memory` is the LSTM's states before the last token of each; None before the first.
        """
        counted = self._tokens.forward
        try:
            return self._logits(ids, mask, memory)
        finally:
            self._tokens.forward = counted

    def _logits(self, ids: Tensor, mask: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        observation = {"input_ids": ids, "attention_mask": mask}
        if hasattr(self._networks, "lstm_actor"):
            return self._recurrent_logits(observation, memory)
        if hasattr(self._networks, "q_net"):
            q = self._networks.q_net(observation)
        else:
            q = self._networks.quantile_net(observation).mean(1)
        best = q.amax(1, keepdim=True)
        chosen = q.argmax(1, keepdim=True)
        return torch.zeros_like(q).scatter_(1, chosen, _POINT_MASS + (best - best)), None  # NaN stays NaN

    def _recurrent_logits(self, observation: dict[str, Tensor], memory: Tensor | None) -> tuple[Tensor, Tensor]:
        layers, _, width = self._networks.lstm_hidden_state_shape
        rows = len(observation["input_ids"])
        device = observation["input_ids"].device
        if memory is None:
            memory = torch.zeros((rows, layers, 2 * width), device=device)
        states = tuple(x.transpose(0, 1).contiguous() for x in memory.split(width, dim=-1))
        starts = torch.zeros(rows, device=device)
        distribution, states = self._networks.get_distribution(observation, states, starts)
        return distribution.distribution.logits, torch.cat([x.transpose(0, 1) for x in states], dim=-1)


class PrefixState:
    """Running responses (`lmgym.models.policy.PolicyState`), read from their start with every token."""

    def __init__(self, forward: Forward, ids: Tensor, mask: Tensor) -> None:
        self._forward = forward
        self._ids = ids
        self._mask = mask
        self._memory: Tensor | None = None
        self.logits: Tensor = torch.empty(0)
        self.values: Tensor | None = None

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        width = max(self._ids.shape[1], prompt_ids.shape[1])
        self._ids = _widen(self._ids, width)
        self._mask = _widen(self._mask, width)
        prompt_ids = _widen(prompt_ids, width)
        prompt_mask = _widen(prompt_mask.bool(), width)
        self._ids[rows] = prompt_ids
        self._mask[rows] = prompt_mask
        logits, memory = self._forward(prompt_ids, prompt_mask, None)
        if not len(self.logits):
            self.logits = logits.new_zeros((len(self._ids), logits.shape[1]))
            self._memory = None if memory is None else memory.new_zeros((len(self._ids), *memory.shape[1:]))
        self.logits[rows] = logits
        if self._memory is not None:
            self._memory[rows] = cast(Tensor, memory)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        self._ids = torch.cat([self._ids, tokens.unsqueeze(1)], dim=1)
        self._mask = nn.functional.pad(self._mask, (0, 1), value=True)
        self.logits, self._memory = self._forward(self._ids, self._mask, self._memory)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._ids = self._ids[rows]
        self._mask = self._mask[rows]
        self.logits = self.logits[rows]
        self._memory = None if self._memory is None else self._memory[rows]


def _widen(x: Tensor, width: int) -> Tensor:
    """(n, width): the columns (n, W) at the right, zeros before them."""
    return nn.functional.pad(x, (width - x.shape[1], 0))
