"""Makes transition tables and their tokenizers: by hand, at random, and from a corpus.

Shapes: V vocabulary, C contexts (V to the power of the order).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmgym.errors import InvalidArgumentError, check_int, check_number
from lmgym.models.causal import CausalLM, freeze
from lmgym.models.markov import MarkovLM, Table

_MIN_DRAWN_PROB = 1e-6  # of random rows


def symbol_tokenizer(symbols: Sequence[str], eos: str = "<eos>", chars: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each symbol: id 0 is the EOS, id i the i-th symbol.

    There is no pad and no unknown token: every id of the vocabulary is an action.

    Args:
        symbols: V - 1 different texts without blanks. eos: how the end is written.
        chars: symbols are single characters, and texts are not split at blanks.

    Raises:
        InvalidArgumentError: for symbols that the tokenizer could not tell apart.
    """
    for symbol in symbols:
        if not symbol or (len(symbol) != 1 if chars else symbol.split() != [symbol]):
            kind = "single characters" if chars else "texts without blanks"
            raise InvalidArgumentError(f"`symbols` must be {kind}, got {symbol!r}.")
    vocabulary = {symbol: i for i, symbol in enumerate([eos, *symbols])}
    if len(vocabulary) != len(symbols) + 1:
        raise InvalidArgumentError(f"`symbols` must all differ, from each other and from {eos!r}, got {symbols!r}.")
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated") if chars else pre_tokenizers.WhitespaceSplit()
    if chars:
        backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=AddedToken(eos, special=True))


def markov_lm(rows: Table, symbols: Sequence[str], *, mixture: Table | None = None, order: int = 1) -> CausalLM:
    """A frozen table over the EOS (id 0) and `symbols`, with their tokenizer, as a task takes it for its model.

    Args:
        rows, mixture, order: those of `MarkovLM.from_probs`. symbols: V - 1 texts.
    """
    return CausalLM(freeze(MarkovLM.from_probs(rows, mixture, order=order)), symbol_tokenizer(symbols))


def dirichlet_rows(rng: np.random.Generator, contexts: int, size: int, concentration: float) -> npt.NDArray[np.float64]:
    """(contexts, size) float64: symmetric Dirichlet rows, mixed with a uniform one so that no entry is below 1e-6.

    Args:
        rng: draws them. contexts: how many rows. size: of each.
        concentration: of every component; below 1 the rows are peaked, above it they are flat.
    """
    check_int("contexts", contexts, 1)
    check_int("size", size, 1, int(1 / _MIN_DRAWN_PROB))
    check_number("concentration", concentration, 0, open_low=True)
    rows = rng.dirichlet(np.full(size, concentration), size=contexts)
    return (1 - size * _MIN_DRAWN_PROB) * rows + _MIN_DRAWN_PROB


def fit_markov(
    sequences: Iterable[Sequence[int]],
    vocab_size: int,
    order: int,
    *,
    smoothing: float = 0.1,
    eos_token_id: int = 0,
) -> npt.NDArray[np.float64]:
    """The table of a corpus: counts of each token after each context, with `smoothing` added to all of them.

    Args:
        sequences: token ids, each from its start; an EOS at the end is for the caller to add.
        vocab_size: V. order: 0, 1 or 2.
        smoothing: added to every count (additive smoothing), > 0.
        eos_token_id: what tokens before the start count as.

    Returns:
        (C, V) float64, each row a distribution.

    Raises:
        InvalidArgumentError: for a sequence with an id outside the vocabulary.
    """
    check_int("order", order, 0, 2)
    check_number("smoothing", smoothing, 0, open_low=True)
    counts = np.full((vocab_size,) * order + (vocab_size,), smoothing)
    for sequence in sequences:
        padded = np.array([eos_token_id] * order + list(sequence), dtype=np.int64)
        if ((padded < 0) | (padded >= vocab_size)).any():
            raise InvalidArgumentError(f"`sequences` must hold ids from 0 to {vocab_size - 1}, got {sequence!r}.")
        np.add.at(counts, tuple(padded[i : len(padded) - order + i] for i in range(order + 1)), 1.0)
    counts = counts.reshape(-1, vocab_size)
    return counts / counts.sum(1, keepdims=True)
