"""Chance: every token of the tokenizer is as likely as any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.fixed import FixedPolicyAgent
from lmgym.automata import Automaton
from lmgym.models.causal import CausalLM
from lmgym.models.policy import Policy
from lmgym.optimum.automaton import PolicyLogits


class UniformState:
    """B running responses, whose past does not matter (`lmgym.models.policy.PolicyState`)."""

    values = None

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def step(self, tokens: Tensor) -> None:
        """Changes nothing."""

    def keep(self, rows: Tensor) -> None:
        """Keeps only these rows (n,), in this order."""
        self.logits = self.logits[rows]

    def begin(self, rows: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """Changes nothing."""


class UniformPolicy:
    """The uniform distribution over the tokens that the tokenizer has (`lmgym.models.policy.Policy`)."""

    def __init__(self, lm: CausalLM) -> None:
        self.logits = lm.legal_logits(torch.zeros(lm.vocab_size, device=lm.device))

    @property
    def device(self) -> torch.device:
        """That of the reference."""
        return self.logits.device

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> UniformState:
        """Starts (B,) responses; prompts (B, P) do not matter."""
        return UniformState(self.logits.repeat(len(prompt_ids), 1))

    def state_logits(self, prompt_ids: Sequence[int], automaton: Automaton) -> PolicyLogits:
        """The same in every state (`lmgym.optimum.exact.StatePolicy`)."""
        return lambda t, contexts, states: self.logits.cpu().repeat(len(contexts), 1)


class Uniform(FixedPolicyAgent):
    """Samples tokens uniformly, EOS tokens too: how far random exploration gets, and what it costs in KL."""

    def make_policy(self) -> Policy:
        """The uniform distribution over tokens."""
        return UniformPolicy(self.envs.engine.lm)
