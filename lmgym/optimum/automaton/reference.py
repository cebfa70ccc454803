"""The reference as a table of transition probabilities.

A context is what the next token depends on: nothing (order 0), the last token (order 1), or the last two (order 2).
Contexts are in groups, and within a group the next context depends on the action alone.

Shapes: V vocabulary, S automaton states, C contexts, in G groups of K members (order 0: G = K = 1; order 1: G = 1,
K = V; order 2: the K contexts of a group have one last token), R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmgym.errors import InvalidArgumentError
from lmgym.models.causal import CausalLM
from lmgym.models.markov import MIN_PROB, MarkovLM

MAX_ENTRIES_AT_ONCE = 1 << 22  # of (rows, V) tables, and of factors that may be multiplied out


class ReferenceTable:
    """pi_ref of a `MarkovLM` in float64, as factors of a table with a row for each context.

    Args:
        lm: the reference.

    Attributes:
        factors: ((G, K, V),), or of a low-rank model ((G, K, R), (1, R, V)).
        legal: (V,) bool, ids that the tokenizer has.
        size: the model's own vocabulary, which may be larger than V; contexts are numbered with it.
    """

    def __init__(self, lm: CausalLM) -> None:
        model = lm.model
        if not isinstance(model, MarkovLM):
            raise InvalidArgumentError(f"`model` must be a MarkovLM for this solver, got {type(model).__name__}.")
        self._trunk = model.trunk
        self.vocab_size = lm.vocab_size
        self.size = model.trunk.vocab_size
        self.order = model.trunk.order
        self.legal = lm.legal_table
        tables = [x.detach().cpu().double() for x in (model.mixture, model.rows) if x is not None]
        if len(tables) == 2 and tables[1].min() < MIN_PROB:  # the model raises small products, which do not factor
            if len(tables[0]) * self.size > MAX_ENTRIES_AT_ONCE:
                raise InvalidArgumentError(
                    f"`rows` of a low-rank model of this size must not be below {MIN_PROB:g}, got {tables[1].min():g}."
                )
            tables = [tables[0] @ tables[1]]
        rows = tables[-1].clamp(min=MIN_PROB)[:, : self.vocab_size] * self.legal
        sums = rows.sum(1)
        factors = [rows / sums[:, None]]
        if len(tables) == 2:
            mixture = tables[0] * sums
            factors.insert(0, mixture / mixture.sum(1, keepdim=True))
        self.factors = [self._group(factors[0]), *(factor[None] for factor in factors[1:])]

    def _group(self, table: Tensor) -> Tensor:
        """(C, n) -> (G, K, n)."""
        if self.order < 2:
            return table[None]
        return table.view(self.size, self.size, -1).transpose(0, 1).contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """G groups of contexts, and K contexts in each."""
        return self.factors[0].shape[0], self.factors[0].shape[1]

    def locate(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The group of contexts (n,) in the model's numbering, and which member of it each is."""
        if self.order < 2:
            return torch.zeros_like(contexts), contexts
        return contexts % self.size, contexts // self.size

    def contexts_in(self, group: int, members: Tensor) -> Tensor:
        """(n,) contexts in the model's numbering of members (n,) of a group: the inverse of `locate`."""
        return members if self.order < 2 else members * self.size + group

    def first_context(self, prompt_ids: Sequence[int]) -> int:
        """The context after a prompt."""
        ids = torch.tensor([[self._trunk.before, self._trunk.before, *prompt_ids]])
        return int(self._trunk.contexts(ids)[0, -1])

    def next_contexts(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """(n,) contexts that tokens lead to."""
        return self._trunk.following(contexts, tokens)

    def probs(self, contexts: Tensor) -> Tensor:
        """(n, V) probabilities of the next token in contexts (n,)."""
        rows = self.factors[0][self.locate(contexts)]
        for factor in self.factors[1:]:
            rows = rows @ factor[0]
        return rows

    def expect(self, x: Tensor) -> Tensor:
        """(..., G, K, S) expectations over actions of x (..., G or 1, V, S)."""
        for factor in reversed(self.factors):
            x = factor @ x
        return x

    def transpose(self) -> list[Tensor]:
        """The factors of the table with contexts and actions swapped: they carry probability forward."""
        return [factor.mT for factor in reversed(self.factors)]

    def after(self, table: Tensor) -> Tensor:
        """(..., G or 1, V, S): a table (..., G, K, S) of contexts, at the context that each action leads to."""
        if self.order == 0:
            return table.expand(*table.shape[:-2], self.vocab_size, table.shape[-1])
        return (table.transpose(-3, -2) if self.order == 2 else table)[..., : self.vocab_size, :]

    def add_arrivals(self, moved: Tensor, empty: float, add: Callable[[Tensor], Tensor]) -> Tensor:
        """(..., G, K, S): the sums, in each context, of what actions (..., G, V, S) carry there from the groups.

        Args:
            moved: what is carried. empty: the sum in a context that nothing is carried to. add: sums over dimension -2.
        """
        if self.order == 0:
            return add(moved).unsqueeze(-2)
        full = torch.nn.functional.pad(moved, (0, 0, 0, self.shape[1] - self.vocab_size), value=empty)
        return full.transpose(-3, -2) if self.order == 2 else full
