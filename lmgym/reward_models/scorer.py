"""A reward model as a module that scores sequences of token ids, and the loss of a batch under an objective.

Shapes: n sequences; B prompts with N completions in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmgym.errors import InvalidArgumentError
from lmgym.models.positions import max_positions
from lmgym.reward_models.config import RewardConfig
from lmgym.reward_models.examples import Batch, encode_texts
from lmgym.rewards.normalisation import apply_normalisation
from lmgym.rewards.ranking import kwise_loss, pairwise_loss, plackett_luce_loss, regression_loss
from lmgym.rewards.sequence import sequence_logits


class Scorer(nn.Module):
    """Scores sequences with a model whose dropout is always off.

    Args:
        model: a sequence-classification model with one label.
        learns_ties: whether there is a weight for how often completions are tied (`pair_losses`).
    """

    def __init__(self, model: Any, learns_ties: bool = False) -> None:
        super().__init__()
        self.model = model
        self.tie_log_odds = nn.Parameter(torch.zeros((), device=model.device)) if learns_ties else None

    def train(self, mode: bool = True) -> Scorer:
        """Stays in eval mode, whatever is asked for."""
        super().train(False)
        return self

    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(n,) scores of n sequences, in one forward of the model."""
        return sequence_logits(self.model, sequences)[:, 0]


def objective_loss(scores: Tensor, batch: Batch, config: RewardConfig, tie_log_odds: Tensor | None = None) -> Tensor:
    """The mean loss of a batch, scalar.

    Args:
        scores: (N,) of its completions. batch: what was judged. config: with the objective.
        tie_log_odds: as for `lmgym.rewards.ranking.pair_losses`.
    """
    if config.objective == "plackett_luce":
        return plackett_luce_loss(scores, batch.rankings, batch.sizes)
    if config.objective == "regression":
        ratings, prompt = batch.ratings()
        return regression_loss(scores, ratings.to(scores.device), prompt.to(scores.device), len(batch.examples))
    loss = kwise_loss if config.objective == "kwise" else pairwise_loss
    return loss(scores, batch.comparisons().to(scores.device), config.margin, tie_log_odds)


def loss_weight(sizes: int, config: RewardConfig) -> float:
    """What a prompt with so many completions counts in the mean loss of a batch."""
    return sizes * (sizes - 1) / 2 if config.objective == "pairwise" else 1.0


@torch.no_grad()
def score_sequences(model: Any, sequences: Sequence[Sequence[int]], batch_size: int = 256) -> Tensor:
    """(n,) float32 scores of sequences on the CPU, normalised as the config of the model says.

    Args:
        model: a sequence-classification model with one label, in eval mode. sequences: token ids.
        batch_size: rows a forward; sequences of like length share one.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        logits = sequence_logits(model, [sequences[i] for i in rows])[:, 0]
        scores[rows] = logits.cpu().float()
    return apply_normalisation(model.config, scores)


def score_texts(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Scores of texts under a reward model.

    Args:
        model: A sequence-classification model with one label.
        tokenizer: Its tokenizer.
        texts: N texts, prompt + completion, EOS included where the response has one.
        batch_size: Rows a forward; texts of like length share one.

    Returns:
        (N,) float32 on the CPU.

    Raises:
        InvalidArgumentError: If a text has no token or more than the model has positions.
    """
    model.eval()
    sequences = encode_texts(tokenizer, texts)
    limit = max_positions(model)
    for text, ids in zip(texts, sequences, strict=True):
        if not ids or (limit is not None and len(ids) > limit):
            most = "" if limit is None else f" to {limit}"
            raise InvalidArgumentError(f"`texts` must have 1{most} tokens each, got {len(ids)} in {text!r}.")
    return score_sequences(model, sequences, batch_size)
