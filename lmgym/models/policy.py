"""The protocol of what decodes: the whole-episode path and the step loop both drive it.

Shapes: B responses, P prompt columns, T response columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmgym.ending import EndRule
from lmgym.models.causal import CausalLM
from lmgym.models.decoding import make_decoder
from lmgym.models.drawing import Drawing
from lmgym.models.ring import RingDecoder
from lmgym.models.sampling import Sampler


class PolicyState(Protocol):
    """B running responses."""

    @property
    def logits(self) -> Tensor:
        """(B, V) of each response's next token."""

    @property
    def values(self) -> Tensor | None:
        """(B,) the critic's estimate at that state, or None."""

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""


class Policy(Protocol):
    """A distribution over the next token, given the tokens before it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> PolicyState:
        """Reads prompts (B, P) int64, left-padded, mask True on tokens; at most `max_new_tokens` steps follow."""


@runtime_checkable
class Responder(Protocol):
    """What answers prompts with whole responses, drawn where their logits stay: in another process, say."""

    @property
    def device(self) -> torch.device:
        """Where the episodes of a batch go."""

    def complete(
        self,
        lm: CausalLM,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        uniforms: Tensor,
        end_rule: EndRule[npt.NDArray[np.bool_]],
    ) -> tuple[Tensor, Tensor]:
        """A response to each of B prompts.

        Args:
            lm: the reference, whose tokens and temperature are also those of what answers.
            prompts: B, token ids.
            sampler: how tokens are drawn, given logits.
            uniforms: (B, T) float64, for what has no randomness of its own.
            end_rule: when a response ends.

        Returns:
            On the CPU, (B, T) response ids and the log-probs that they were drawn with; padding and 0 after an end.
        """


class Steps(Protocol):
    """What runs a policy over a drawing."""

    drawing: Drawing

    def advance(self) -> None:
        """Has the policy read the newest tokens, and draws the next."""

    def keep(self, slots: Tensor) -> None:
        """Goes on with these slots (n,) alone, in this order."""


class PlainSteps:
    """A forward of the policy, then a draw: `Steps` of any policy."""

    def __init__(self, state: PolicyState, drawing: Drawing) -> None:
        self._state = state
        self.drawing = drawing

    def advance(self) -> None:
        """Has the policy read the newest tokens, and draws the next."""
        drawing = self.drawing
        self._state.step(drawing.tokens[: drawing.size])
        drawing.draw(self._state.logits, self._state.values)
        drawing.position += 1

    def keep(self, slots: Tensor) -> None:
        """Goes on with these slots (n,) alone, in this order."""
        self._state.keep(slots)
        self.drawing.keep(slots)


class CapturedSteps:
    """A forward and a draw in one launch: `Steps` of a decoder that has taken the drawing over."""

    def __init__(self, decoder: RingDecoder, drawing: Drawing, value_head: torch.nn.Module | None) -> None:
        self.drawing = drawing
        self._decoder = decoder
        self._value_head = value_head

    def advance(self) -> None:
        """Has the model read the newest tokens, and draws the next."""
        self._decoder.step_and_draw(self.drawing, self._value_head)

    def keep(self, slots: Tensor) -> None:
        """Goes on with these slots (n,) alone, in this order."""
        self._decoder.keep(slots)
        self.drawing.keep(slots)


class CausalState:
    """Running responses of a causal LM, with a value head on its hidden state if it has one."""

    def __init__(self, lm: CausalLM, slots: int, capacity: int, value_head: torch.nn.Module | None = None) -> None:
        self._decoder = make_decoder(lm, slots, capacity, keep_hidden=value_head is not None)
        self._value_head = value_head

    @property
    def logits(self) -> Tensor:
        """(B, V) of each response's next token."""
        return self._decoder.logits

    @property
    def values(self) -> Tensor | None:
        """(B,) the value head's estimate, or None without one."""
        if self._value_head is None or self._decoder.hidden is None:
            return None
        with torch.inference_mode():
            values: Tensor = self._value_head(self._decoder.hidden.float()).squeeze(-1)
        return values

    def steps(self, drawing: Drawing) -> Steps:
        """What runs this model over a drawing whose first tokens have been drawn."""
        if isinstance(self._decoder, RingDecoder):
            taken = self._decoder.take_over(drawing, self._value_head)
            if taken is not None:
                return CapturedSteps(self._decoder, taken, self._value_head)
        return PlainSteps(self, drawing)

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Restarts rows (n,) from prompts (n, P), left-padded."""
        self._decoder.begin(rows, prompt_ids, prompt_mask)

    def step(self, tokens: Tensor) -> None:
        """Appends a token (B,) to every response."""
        self._decoder.step(tokens)

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self._decoder.keep(rows)


class CausalPolicy:
    """A causal LM as a policy; made of the task's own model it is the reference policy."""

    def __init__(self, lm: CausalLM, value_head: torch.nn.Module | None = None) -> None:
        self.lm = lm
        self.value_head = value_head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> CausalState:
        """Reads prompts (B, P), left-padded, in one forward."""
        b, p = prompt_ids.shape
        state = CausalState(self.lm, b, p + max_new_tokens, self.value_head)
        state.begin(torch.arange(b, device=prompt_ids.device), prompt_ids, prompt_mask)
        return state
