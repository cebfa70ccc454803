"""A causal language model that is a transition table: the next token depends on the last one or two alone.

Its probabilities are known in closed form, so that sums over all responses can be carried out. In everything else it is
a Hugging Face model like any other.

Shapes: B rows, L columns, V vocabulary, C contexts (V to the power of the order), R rank, D width of the hidden state
(V for a full table, R for one of low rank).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lmgym.errors import InvalidArgumentError, check_int
from lmgym.models.caches import CACHE_FIELD

Table = Tensor | npt.NDArray[np.floating[Any]]

MIN_PROB = 1e-12  # smaller probabilities count as this one, so that no log-prob is -inf
_SUM_TOLERANCE = 1e-4  # float32 rows of a large vocabulary are off by less


class MarkovConfig(PretrainedConfig):
    """Shape of a `MarkovLM`.

    Args:
        vocab_size: V. order: tokens the next one depends on: 0, 1 or 2.
        rank: R of the factors; None is a full table.
        eos_token_id: what tokens before the start of a sequence count as.
    """

    model_type = "lmgym_markov"

    def __init__(
        self,
        vocab_size: int = 2,
        order: int = 1,
        rank: int | None = None,
        eos_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.order = order
        self.rank = rank
        self.hidden_size = rank or vocab_size
        self.num_hidden_layers = 1
        special = {"eos_token_id": eos_token_id, "pad_token_id": eos_token_id, "tie_word_embeddings": False}
        super().__init__(**{**special, **kwargs})


class MarkovTrunk(nn.Module):
    """Hidden states of contexts: a table (C, D) of them, and the tokens seen so far as its cache."""

    def __init__(self, config: MarkovConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.order = config.order
        self.before = config.eos_token_id or 0  # what tokens before the start of a sequence count as
        self.table = nn.Parameter(torch.full((self.vocab_size**self.order, config.hidden_size), 1 / config.hidden_size))

    def contexts(self, ids: Tensor) -> Tensor:
        """(B, L) context after each column of token ids (B, L); columns before the first count as EOS."""
        before = nn.functional.pad(ids[:, :-1], (1, 0), value=self.before) if self.order == 2 else ids
        return self.following(before, ids)

    def following(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """The contexts that tokens lead to, both int64 of one shape."""
        if self.order == 0:
            return torch.zeros_like(tokens)
        return tokens if self.order == 1 else contexts % self.vocab_size * self.vocab_size + tokens

    def hidden(self, contexts: Tensor) -> Tensor:
        """(..., D) of contexts (...)."""
        return nn.functional.embedding(contexts, self.table)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) of token ids (B, L); the last L columns of a mask (B, >= L) belong to them."""
        length = input_ids.shape[1]
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask[:, -length:] == 0, self.before)
        if use_cache and cache is None:
            cache = DynamicCache()
        seen = input_ids
        if cache is not None:  # it holds ids instead of keys and values: (B, 1 head, columns, width 1)
            column = input_ids[:, None, :, None]
            seen = cache.update(column, column, 0)[0][:, 0, :, 0]
        recent = seen[:, -(length + 1) :]  # a context reaches back by two tokens at most
        hidden = self.hidden(self.contexts(recent)[:, -length:])
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_FIELD: cache})


class MarkovHead(nn.Module):
    """Log-probs of hidden states: log(h) for a full table, log(h @ rows) for one of low rank.

    Attributes:
        rows: (R, V), or None for a full table. in_features: D. out_features: V.
    """

    def __init__(self, config: MarkovConfig) -> None:
        super().__init__()
        self.in_features = config.hidden_size
        self.out_features = config.vocab_size
        shape = (config.hidden_size, config.vocab_size)
        self.rows = None if config.rank is None else nn.Parameter(torch.full(shape, 1 / config.vocab_size))

    def probs(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., D)."""
        return hidden if self.rows is None else hidden @ self.rows

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., V) float32 nats of hidden states (..., D)."""
        return self.probs(hidden).float().clamp(min=MIN_PROB).log()

    def log_probs(self, hidden: Tensor, tokens: Tensor, legal: Tensor) -> Tensor:
        """Log-probs of single tokens, at the cost of a look-up and not of a whole distribution.

        Args:
            hidden: (n, D). tokens: (n,) int64.
            legal: (V',) float, 1 on those of the first V' tokens that the tokenizer has; they alone sum to 1.

        Returns:
            (n,) float32 nats.
        """
        if self.rows is None:
            chosen = hidden.gather(1, tokens[:, None])[:, 0]
            mass = hidden[:, : len(legal)] @ legal.to(hidden)
        else:
            chosen = (hidden * self.rows.index_select(1, tokens).T).sum(1)
            mass = hidden @ (self.rows[:, : len(legal)] @ legal.to(hidden))
        return (chosen.float().clamp(min=MIN_PROB) / mass.float()).log()


class MarkovLM(PreTrainedModel, GenerationMixin):
    """pi(a | context), where the context is the last `order` tokens, as probabilities in a table.

    The index of a context is 0 for order 0, the last token for order 1, and (the one before it) * V + (the last) for
    order 2. Tokens before the start of a sequence, and masked ones, count as the EOS. Logits are log-probs.
    """

    config_class = MarkovConfig
    base_model_prefix = "trunk"

    def __init__(self, config: MarkovConfig) -> None:
        super().__init__(config)
        check_int("order", config.order, 0, 2)
        self.trunk = MarkovTrunk(config)
        self.lm_head = MarkovHead(config)
        self.post_init()

    @property
    def rows(self) -> nn.Parameter:
        """(C, V), or (R, V) where there is a mixture: each row a distribution over tokens."""
        return self.trunk.table if self.lm_head.rows is None else self.lm_head.rows

    @property
    def mixture(self) -> nn.Parameter | None:
        """(C, R), each row a distribution over `rows`; None for a full table."""
        return None if self.lm_head.rows is None else self.trunk.table

    @classmethod
    def from_probs(cls, rows: Table, mixture: Table | None = None, *, order: int, eos_token_id: int = 0) -> MarkovLM:
        """The model with pi(. | c) = rows[c], or mixture[c] @ rows.

        Args:
            rows: (C, V) of a full table, or (R, V). mixture: (C, R), or None. Each row of both is a distribution.
            order: 0, 1 or 2. eos_token_id: what tokens before the start count as.

        Raises:
            InvalidArgumentError: for a shape that does not fit, or a row that is no distribution.
        """
        check_int("order", order, 0, 2)
        probs = _distributions("rows", rows)
        vocab_size = probs.shape[1]
        weights = None if mixture is None else _distributions("mixture", mixture)
        if weights is None:
            _check_shape("rows", probs, (vocab_size**order, vocab_size), order, vocab_size)
        else:
            _check_shape("mixture", weights, (vocab_size**order, len(probs)), order, vocab_size)
        check_int("eos_token_id", eos_token_id, 0, vocab_size - 1)
        rank = None if weights is None else len(probs)
        model = cls(MarkovConfig(vocab_size=vocab_size, order=order, rank=rank, eos_token_id=eos_token_id))
        with torch.no_grad():
            model.rows.copy_(probs)
            if weights is not None:
                model.trunk.table.copy_(weights)
        return model.eval()

    def probs(self, context: Tensor) -> Tensor:
        """(n, V) float32 probabilities of the next token after contexts (n,) int64."""
        return self.lm_head.probs(self.trunk.hidden(context)).float()

    def get_input_embeddings(self) -> nn.Module:
        """The trunk, which turns ids into hidden states."""
        return self.trunk

    def get_output_embeddings(self) -> nn.Module:
        """The LM head, which turns hidden states into logits."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing, because every module starts uniform."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log-probs of the token after each column.

        Args:
            input_ids: (B, L). attention_mask: (B, L), or (B, past + L) with a cache; 0 counts as the EOS.
            position_ids: ignored, because a table has no positions.
            past_key_values: a cache that grows (`DynamicCache`), in which the ids are put; `cache` is its other name.
            use_cache: whether to make a cache where none is given.
            logits_to_keep: how many of the last columns to return (0: all of them), or which.
            output_hidden_states: whether to return the input of the head too.

        Returns:
            logits (B, L', V), the cache, and hidden_states with one (B, L, D).
        """
        out = self.trunk(input_ids, attention_mask, past_key_values if cache is None else cache, use_cache)
        hidden = out.last_hidden_state
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden[:, columns]),
            hidden_states=(hidden,) if output_hidden_states else None,
            **{CACHE_FIELD: out.get(CACHE_FIELD)},
        )


AutoConfig.register(MarkovConfig.model_type, MarkovConfig)
AutoModelForCausalLM.register(MarkovConfig, MarkovLM)


def _check_shape(argument: str, table: Tensor, expected: tuple[int, int], order: int, vocab_size: int) -> None:
    if tuple(table.shape) != expected:
        raise InvalidArgumentError(
            f"`{argument}` must have shape {expected} at order {order} and {vocab_size} tokens, got "
            f"{tuple(table.shape)}."
        )


def _distributions(argument: str, table: Table) -> Tensor:
    """(rows, columns) float64, each row summing to 1."""
    rows = (table.detach() if isinstance(table, Tensor) else torch.from_numpy(np.array(table))).double()
    if rows.ndim != 2 or not rows.numel():
        raise InvalidArgumentError(f"`{argument}` must be a table of two dimensions, got shape {tuple(rows.shape)}.")
    bad = ~((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() <= _SUM_TOLERANCE))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise InvalidArgumentError(
            f"`{argument}` must hold distributions, >= 0 and summing to 1, and row {i} has a smallest entry of "
            f"{rows[i].min():g} and a sum of {rows[i].sum():g}."
        )
    return rows / rows.sum(1, keepdim=True)
